"""Cross-entropy and embedding lookup with the vocabulary split over a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import Mesh, NamedSharding

from olmoe_jax.ops import cross_entropy
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.ops.embedding import embedding_lookup
from olmoe_jax.parallel import sharding

POSITIONS, WIDTH = 27, 16
MESHES = {"data=2,fsdp=4": (2, 4), "fsdp=2,expert=4": (1, 2, 4)}


def make_case(vocab: int):
    """Scales [8, S, D], head and embedding [V, D], tokens, targets, weights [8, S]."""
    random = np.random.default_rng(vocab)
    shape = (8, POSITIONS)
    weights = random.random(shape) * (random.random(shape) < 0.7)
    return (
        random.normal(size=(*shape, WIDTH)).astype(np.float32),
        *random.normal(size=(2, vocab, WIDTH)).astype(np.float32) / 2,
        *random.integers(0, vocab, (2, *shape)).astype(np.int32),
        weights.astype(np.float32),
    )


def oracle(scales, head, embed, tokens, targets, weights) -> dict[str, np.ndarray]:
    """Value and gradients of the loss that `compiled` computes, by hand in float64."""
    scales, head, embed, weights = (a.astype(np.float64) for a in (scales, head, embed, weights))
    rows = embed[tokens]
    logits = (scales * rows) @ head.T
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    is_target = np.eye(len(head))[targets]
    value = -np.sum(weights * np.log((probabilities * is_target).sum(-1)))
    d_logits = weights[..., None] * (probabilities - is_target)
    d_hidden = d_logits @ head
    d_embed = np.zeros_like(embed)
    np.add.at(d_embed, tokens, d_hidden * scales)
    d_head = np.einsum("bsv,bsd->vd", d_logits, scales * rows)
    d_weights = -np.log((probabilities * is_target).sum(-1)) * (weights != 0)
    return {
        "loss": value,
        "hidden": d_hidden * rows,
        "head": d_head,
        "embed": d_embed,
        "weights": d_weights,
    }


def compiled(mesh: Mesh, vocab: int, dtype, positions: int = POSITIONS):
    """The value and gradients of the loss, compiled for arrays as the trainer places them."""
    batch = NamedSharding(mesh, sharding.BATCH)
    table_spec = sharding.partition_spec((vocab, WIDTH), ("vocab", "embed"), mesh)
    table = NamedSharding(mesh, table_spec)

    def loss(scales, head, embed, tokens, targets, weights):
        hidden = scales.astype(dtype) * embedding_lookup(embed, tokens, dtype)
        return weighted_cross_entropy(hidden, head, targets, weights)

    shardings = (batch, table, table, batch, batch, batch)
    shape = (8, positions)
    structs = (
        jax.ShapeDtypeStruct((*shape, WIDTH), jnp.float32, sharding=batch),
        *[jax.ShapeDtypeStruct((vocab, WIDTH), jnp.float32, sharding=table)] * 2,
        *[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch)] * 2,
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch),
    )
    with jax.set_mesh(mesh):
        gradients = jax.value_and_grad(loss, (0, 1, 2, 5))
        step = jax.jit(gradients, out_shardings=(None, (*shardings[:3], batch)))
        return step.lower(*structs).compile(), shardings


def errors(mesh: str, vocab: int, dtype) -> dict[str, float]:
    """The relative error of the loss and of each gradient."""
    case = make_case(vocab)
    step, shardings = compiled(sharding.make_mesh(*MESHES[mesh]), vocab, dtype)
    value, gradients = jax.device_get(step(*jax.device_put(case, shardings)))
    names = ("loss", "hidden", "head", "embed", "weights")
    actual = dict(zip(names, (value, *gradients), strict=True))
    expected = oracle(*case)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("vocab", [48, 50])
def test_loss_and_gradients(monkeypatch, vocab, mesh):
    """Against float64 by hand; 50 rows divide by fsdp=2 alone, 27 positions by no chunk."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    found = errors(mesh, vocab, jnp.float32)
    assert max(found.values()) < 1e-6, found


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    found = errors("data=2,fsdp=4", 48, jnp.bfloat16)
    assert 1e-5 < max(found.values()) < 2e-2, found


def test_no_whole_table_and_no_rows_logits(monkeypatch, with_optimizations):
    """A device sees only its own 2,049 rows of a vocabulary of 16,392 = 8 x 2,049."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 64)
    vocab, positions, chunk = 16392, 600, 60
    program = compiled(sharding.make_mesh(1, 2, 4), vocab, jnp.float32, positions)[0]
    found = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text()))
    shapes = [[int(size) for size in shape.split(",")] for shape in found]
    assert not [shape for shape in shapes if vocab in shape]
    sizes = {math.prod(shape) for shape in shapes}
    assert vocab * WIDTH not in sizes
    assert max(sizes) == 8 * chunk * vocab // 8 < positions * vocab
