"""A pretrained base and data, for the tests that train."""

import pytest
from tiny import write_base
from training.tiny_run import make_files


@pytest.fixture(scope="session")
def run_files(tmp_path_factory, tokenizer_dir):
    """Tokenizer and data of a tiny run; tests must not change them."""
    return make_files(tmp_path_factory.mktemp("run_files"), tokenizer_dir)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A pretrained base in float32."""
    return write_base(tmp_path_factory.mktemp("base") / "float32")


@pytest.fixture(scope="session")
def bfloat16_base(tmp_path_factory):
    """A pretrained base in bfloat16."""
    return write_base(tmp_path_factory.mktemp("base") / "bfloat16", "bfloat16")
