import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from training.tiny_run import make_files


@pytest.fixture(scope="session")
def compilation_cache_dir(tmp_path_factory):
    """Shared by all runs of these tests, also those in other processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


@pytest.fixture(scope="module", autouse=True)
def _cheap_compilation(compilation_cache_dir):
    """Compiling is nearly all that a tiny run costs: do it once."""
    directory = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache_dir))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def environment(compilation_cache_dir):
    """The same for a process of its own."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory, tokenizer_dir):
    """Model, tokenizer and data of a tiny run; tests must not change them."""
    return make_files(tmp_path_factory.mktemp("files"), tokenizer_dir)
