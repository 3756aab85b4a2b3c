"""Cores and memory of the machine, for what runs on its CPU. Imports no jax."""

import ctypes
import os
import sys
from pathlib import Path

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_MOST_CORES = 16
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restarts this process, before its work begins, so that malloc asks Linux for huge pages.

    XLA gives a step's buffers back to the system and gets them as new ones in the next; in pages
    of 4 KiB, their page faults cost a CPU a fifth of the step. glibc reads the variable only when
    a process starts. Does nothing where it is set already or where Linux does not leave it to
    programs to ask.
    """
    if "GLIBC_TUNABLES" in os.environ or not _MODE.exists() or "[madvise]" not in _MODE.read_text():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | TUNABLES)


def use_all_cores() -> None:
    """Lets jax see a device for every core where it runs on a CPU.

    XLA shares the matmuls of a few tokens badly among cores, but devices work side by side. What
    JAX_NUM_CPU_DEVICES or XLA_FLAGS say already stays.
    """
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(len(os.sched_getaffinity(0)), _MOST_CORES)
        # A power of two, which divides the experts.
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(1 << cores.bit_length() - 1))


def return_freed_memory() -> None:
    """Gives what has been freed back to the system; only glibc, which may keep it, knows how."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
