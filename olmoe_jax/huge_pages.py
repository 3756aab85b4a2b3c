"""Huge pages for the arrays of CPUs."""

import os
import sys
from pathlib import Path

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
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
