import os

import pytest
from training.tiny_run import make_files


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a run in a process of its own."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def files(tmp_path_factory, tokenizer_dir):
    """Model, tokenizer and data of a tiny run; tests must not change them."""
    return make_files(tmp_path_factory.mktemp("files"), tokenizer_dir)
