"""Decoding on meshes: the texts of one device, whatever is split."""

import jax
import numpy as np
import pytest
from tiny import tiny_config, write_hf_checkpoint

from olmoe_jax import from_pretrained, generate
from olmoe_jax.generation.likelihood import log_likelihoods
from olmoe_jax.ops import decoding
from olmoe_jax.parallel.sharding import make_mesh

PROMPTS = ["a", "what is 3 + 4?", "the " * 5, "Question: 1 + 1?", "xyz"]
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "stop": ["b"]}
SPLIT = {"data": 2, "fsdp": 2, "expert": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    write_hf_checkpoint(path, tiny_config(vocab_size=len(tokenizer)))
    return str(path)


@pytest.fixture(scope="module")
def texts(path, tokenizer):
    """texts(mesh, **arguments of generate)"""

    def decode(mesh, **arguments) -> list[str]:
        model = from_pretrained(path, mesh)
        with jax.set_mesh(mesh):
            return generate(model, tokenizer, PROMPTS, max_new_tokens=20, **arguments)

    return decode


@pytest.fixture(scope="module")
def greedy(texts, one_device):
    return texts(one_device)


@pytest.mark.parametrize("sizes", [{}, SPLIT])
def test_greedy(texts, greedy, sizes):
    assert texts(make_mesh(**sizes)) == greedy


def test_drawn(texts, one_device):
    assert texts(make_mesh(data=2), **DRAWN) == texts(one_device, **DRAWN)


@pytest.mark.parametrize("backend", ["gather", None])
def test_greedy_as_accelerators_decode(texts, greedy, monkeypatch, backend):
    monkeypatch.setattr(decoding, "backend", lambda *_: backend)
    assert texts(make_mesh(**SPLIT)) == greedy


def test_log_likelihoods(path, one_device):
    pairs = [([3, 4], [5, 6, 7]), ([1], [2])]
    expected, _ = zip(*log_likelihoods(from_pretrained(path, one_device), pairs), strict=True)
    mesh = make_mesh(**SPLIT)
    model = from_pretrained(path, mesh)
    with jax.set_mesh(mesh):
        found, _ = zip(*log_likelihoods(model, pairs), strict=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
