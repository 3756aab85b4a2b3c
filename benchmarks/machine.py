"""Names a benchmark's processor, versions and date. Imports the standard library only."""

import importlib.metadata
import os
import platform
import re
from datetime import date
from pathlib import Path

_EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_tile": "AMX", "sve": "SVE"}
"""The instructions that make matmuls fast: flag of /proc/cpuinfo -> name."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the processor's name, as far as the system tells it, its instructions and cores."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    found = flags[1].split() if flags else []
    extensions = [wanted for flag, wanted in _EXTENSIONS.items() if flag in found]
    parts = [name[1] if name else platform.processor() or platform.machine(), *extensions]
    return ", ".join([*parts, f"{os.cpu_count()} cores"])


def machine() -> str:
    """Returns the line that belongs above figures: processor, versions and date."""
    jax = importlib.metadata.version("jax")
    return f"{processor()}; Python {platform.python_version()}, jax {jax}; {date.today()}"
