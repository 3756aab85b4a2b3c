"""The cores and the memory of a CPU: how jax and malloc use them. Imports no jax."""

import ctypes
import os
import sys
from pathlib import Path

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_MOST_CORES = 16
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restarts this process so that malloc asks Linux for huge pages. Call it before any work.

    XLA gives a step's buffers back to the system and gets new ones in the next step. In pages of
    4 KiB, the page faults of the new buffers cost a CPU a fifth of the step. glibc reads the
    variable only when a process starts. Does nothing if the variable is set, or if Linux gives huge
    pages to all programs or to none.
    """
    if "GLIBC_TUNABLES" in os.environ or not _MODE.exists() or "[madvise]" not in _MODE.read_text():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | TUNABLES)


def use_all_cores() -> None:
    """Sets the number of jax's CPU devices to the number of cores. Call it before jax starts.

    XLA shares the matmuls of a few tokens badly among cores, but devices work side by side. Does
    nothing if JAX_NUM_CPU_DEVICES or XLA_FLAGS say a number.
    """
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(len(os.sched_getaffinity(0)), _MOST_CORES)
        # A power of two, which divides the experts.
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(1 << cores.bit_length() - 1))


def return_freed_memory() -> None:
    """Gives freed memory back to the system. Only glibc keeps freed memory and has this call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
