"""Compiled programs on disk, so that the second start of a command compiles nothing again."""

import os

from olmoe_jax.files import cache_directory


def keep_programs() -> None:
    """Lets jax keep what it compiles in the cache directory. Call it before jax is imported.

    JAX_COMPILATION_CACHE_DIR names another directory, and JAX_ENABLE_COMPILATION_CACHE=0 keeps
    nothing. Programs that cannot be read or written cost one of jax's warnings, and are compiled.

    Raises:
      UserError: OLMOE_JAX_CACHE is no path.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory("compiled")))
    # jax's own limit, a second, leaves out most of what the start of a small model compiles.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
