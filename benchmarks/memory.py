"""Resident memory of a process, on Linux. Imports the standard library only."""

import ctypes
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


def settled_resident_gib() -> float:
    """Returns the GiB that this process needs now; from here on the peak is counted anew.

    Without the first, a model may seem to take twice its size: glibc keeps some of the memory that
    was freed while it was made, in some runs and not in others. Without the second, the peak would
    be that of compiling or of making the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_gib()


def _status(name: str, pid: int | str = "self") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GIB
    raise OSError(f"/proc/{pid}/status has no {name}")
