import os
from pathlib import Path

import numpy as np
import pytest

from olmoe_jax.data import TokenizedDataset, load_tokenizer

EOS, PAD = "<|endoftext|>", "<|padding|>"


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
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def make_dataset():
    def make(lengths, seed=0):
        """Examples of these lengths with random tokens from 2 up, which are also their identity."""
        random = np.random.default_rng(seed)
        total = sum(lengths)
        return TokenizedDataset(
            tokens=random.integers(2, 2**30, total, dtype=np.int32),
            trained=random.random(total) < 0.6,
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            rows=np.arange(len(lengths)),
            dropped_rows=0,
            total_rows=len(lengths),
            fingerprint="synthetic",
        )

    return make


@pytest.fixture(scope="session")
def shared():
    """The folder with the golden numbers and the real data, which the project ships without."""
    if "OLMOE_JAX_SHARED" not in os.environ:
        pytest.skip("OLMOE_JAX_SHARED is not set")
    return Path(os.environ["OLMOE_JAX_SHARED"])


@pytest.fixture(scope="session")
def olmoe_tokenizer(shared):
    return load_tokenizer(str(shared / "data" / "tokenizer"))
