"""How the programs of a step are compiled, and where compiled programs are kept.

On disk they spare the second start of a command all compiling.
"""

import os
import platform
import re
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

from olmoe_jax.files import cache_directory

_DAMAGE = re.compile(r"Error reading persistent compilation cache entry for '([\w.-]+)'")
"""jax's warning about a program that it cannot read and compiles again."""

_OPTIONS: dict[str, dict[str, bool | int]] = {
    # Without it, an update copies both moments before it overwrites them.
    "cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
    "gpu": {
        # Kernels read a layer's weights where they lie in the stack of all layers. jax 0.12 does
        # this by default; without it a scan over layers copies each layer's weights first.
        "xla_gpu_enable_dynamic_slice_fusion": True,
        # Several transfers run beside the kernels; at XLA's own limit, 1, kernels wait for the
        # others.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
    },
}
_ONE_SCATTER = {"xla_gpu_reduce_scatter_combine_threshold_bytes": 2**32}


def compiler_options(platform: str, layers_ahead: bool) -> dict[str, bool | int] | None:
    """Returns XLA's options for the programs of a step on a platform ("cpu", "gpu" or "tpu").

    `layers_ahead`: the layers run as in `olmoe_jax.model.overlap`, where all gradients of a layer
    are there before the first is scattered.
    """
    options = _OPTIONS.get(platform, {})
    return options | _ONE_SCATTER if platform == "gpu" and layers_ahead else options or None


def keep_programs() -> None:
    """Lets jax keep what it compiles in the cache directory.

    JAX_COMPILATION_CACHE_DIR names another directory, and JAX_ENABLE_COMPILATION_CACHE=0 keeps
    nothing. Programs that cannot be read or written cost a warning, and are compiled.

    Raises:
      UserError: OLMOE_JAX_CACHE is no path.
    """
    # jax's own limit, a second, leaves out most of what the start of a small model compiles.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = cache_directory("compiled") / _processor()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        _replace_damaged_programs(directory)
    if "jax" in sys.modules:  # it read the environment when it was imported
        config, value = sys.modules["jax"].config, os.environ
        config.update("jax_compilation_cache_dir", value["JAX_COMPILATION_CACHE_DIR"])
        limit = float(value["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        config.update("jax_persistent_cache_min_compile_time_secs", limit)


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a name for this kind of processor.

    jax's own key lacks it, and a home directory may be that of machines with other instructions.
    """
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    kind = [line for line in lines if line.startswith(("model name", "flags", "CPU", "Features"))]
    checksum = zlib.crc32("\n".join(kind).encode())
    return f"{platform.machine()}-{checksum:08x}"


def _replace_damaged_programs(directory: Path) -> None:
    """Removes a damaged program when jax warns of it: jax writes no file that is there.

    A process that is killed while it writes a program leaves half of it.
    """
    show = warnings.showwarning

    def remove(message: Warning | str, *rest: Any, **options: Any) -> None:
        damage = _DAMAGE.match(str(message))
        files = [*directory.glob(f"{damage[1]}-*-cache")] if damage else []
        if damage is None or not files:
            show(message, *rest, **options)
            return
        for file in files:
            file.unlink(missing_ok=True)
        print(f"compiling again: {damage[1]} in {directory} is damaged", file=sys.stderr)

    warnings.showwarning = remove
