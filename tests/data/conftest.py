import dataclasses

import numpy as np
import pytest
from tiny import make_examples

from olmoe_jax.data import load_tokenizer


@pytest.fixture(scope="session")
def make_dataset():
    def make(lengths, seed=0):
        """Examples of these lengths with random tokens from 2 up, which are also their identity."""
        random = np.random.default_rng(seed)
        total = sum(lengths)
        return dataclasses.replace(
            make_examples(lengths),
            tokens=random.integers(2, 2**30, total, dtype=np.int32),
            in_loss=random.random(total) < 0.6,
        )

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of the token cache, which is empty."""
    monkeypatch.setenv("OLMOE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def olmoe_tokenizer(shared):
    return load_tokenizer(str(shared / "data" / "tokenizer"))
