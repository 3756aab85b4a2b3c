import os
from pathlib import Path

import pytest

# Compiling takes most of the tests' time and their arrays are tiny. The golden numbers are also
# checked by the commands, fully optimised, in tools/check_reference.py.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

_LONGEST = ("test_processes.py", "test_reproduce.py", "test_faults.py")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


EOS, PAD = "<|endoftext|>", "<|padding|>"


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory):
    """Keeps the tokens of the tests' data out of the user's cache, also in other processes."""
    os.environ["OLMOE_JAX_CACHE"] = str(tmp_path_factory.mktemp("data_cache"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer whose tokens are the bytes of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([EOS, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from olmoe_jax.data import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def shared():
    """The folder with the golden numbers and the real data, which the project ships without."""
    if "OLMOE_JAX_SHARED" not in os.environ:
        pytest.skip("OLMOE_JAX_SHARED is not set")
    return Path(os.environ["OLMOE_JAX_SHARED"])
