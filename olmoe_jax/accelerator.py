"""Finds out which jax this machine needs, for `make install`: no package is there yet.

The names are the extras of jax and of pyproject.toml: `pip install .[cuda13]`.
"""

from __future__ import annotations  # the Makefile's python may be older than 3.11, which it says

import re
import shutil
import subprocess
from pathlib import Path

ACCELERATORS = ("cpu", "cuda12", "cuda13", "tpu")

_DRIVER = {"cuda13": 580, "cuda12": 525}
"""The oldest NVIDIA driver of each CUDA, from NVIDIA's table of minor version compatibility."""
_CUDA13_CAPABILITY = 7.5
"""Turing, the oldest GPUs that CUDA 13 compiles for."""
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI identifiers of TPU v2 to v7x, which jax looks for too (jax/_src/hardware_utils.py)."""


def detect(system: Path = Path("/")) -> tuple[str, str]:
    """Returns one of `ACCELERATORS` and the evidence for it; `system` is the file system's root."""
    if driver := _nvidia_driver(system):
        version, capability = driver
        gpu = f"an NVIDIA GPU with driver {version}"
        major = int(version.partition(".")[0])
        if major >= _DRIVER["cuda13"] and capability >= _CUDA13_CAPABILITY:
            return "cuda13", gpu
        if major >= _DRIVER["cuda12"]:
            return "cuda12", gpu
        return "cpu", f"{gpu}, but jax needs driver {_DRIVER['cuda12']} or newer: update it"
    for device in system.glob("sys/bus/pci/devices/*"):
        identifiers = [_text(device / name) for name in ("vendor", "device")]
        if identifiers[0] == _GOOGLE and identifiers[1] in _TPUS:
            return "tpu", "a TPU"
    return "cpu", "neither an NVIDIA driver nor a TPU"


def _nvidia_driver(system: Path) -> tuple[str, float] | None:
    """Returns the version of the NVIDIA driver and the lowest compute capability, or None."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program:
        query = [program, "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            result = None
        gpus = re.findall(r"^(\d[\d.]*), (\d+\.\d+)$", result.stdout if result else "", re.M)
        if gpus:
            return gpus[0][0], min(float(capability) for _, capability in gpus)
    # A container may have the driver without the program.
    version = re.search(r" (\d{3}\.[\d.]+) ", _text(system / "proc/driver/nvidia/version"))
    return (version[1], _CUDA13_CAPABILITY) if version else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    print(*detect(), sep=": ")
