"""Resident memory of a process, on Linux. Imports the standard library only."""

from pathlib import Path

GIB = 2**30


def resident_gib() -> float:
    """Returns the GiB that this process has in memory now."""
    return _status("VmRSS")


def peak_resident_gib(pid: int | str = "self") -> float:
    """Returns the most GiB that a process ever had in memory.

    getrusage's ru_maxrss would include what the parent held before exec.
    """
    return _status("VmHWM", pid)


def _status(name: str, pid: int | str = "self") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GIB
    raise OSError(f"/proc/{pid}/status has no {name}")
