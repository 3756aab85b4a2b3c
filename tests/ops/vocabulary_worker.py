"""Run by test_vocabulary_mesh.py on 8 virtual devices: prints what it checks as JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from helpers import relative_error
from jax.sharding import NamedSharding

from olmoe_jax.ops import cross_entropy
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.ops.embedding import embedding_lookup
from olmoe_jax.parallel import sharding

POSITIONS, WIDTH = 27, 16


def make_case(vocab):
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


def oracle(scales, head, embed, tokens, targets, weights):
    """Of `loss` below: (value, gradients), by hand in float64."""
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


def compiled(mesh, vocab, dtype, positions=POSITIONS):
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


def errors(mesh, vocab, dtype):
    case = make_case(vocab)
    step, shardings = compiled(mesh, vocab, dtype)
    value, gradients = jax.device_get(step(*jax.device_put(case, shardings)))
    names = ("loss", "hidden", "head", "embed", "weights")
    actual = dict(zip(names, (value, *gradients), strict=True))
    expected = oracle(*case)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def shapes(mesh, vocab, positions) -> list[list[int]]:
    """Of every array in the optimised program of a device."""
    text = compiled(mesh, vocab, jnp.float32, positions)[0].as_text()
    found = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
    return [[int(size) for size in shape.split(",")] for shape in found]


def main():
    assert jax.device_count() == 8
    cross_entropy.CHUNK = 8
    meshes = {
        "data=2,fsdp=4": sharding.make_mesh(2, 4),
        "fsdp=2,expert=4": sharding.make_mesh(1, 2, 4),
    }
    result = {
        f"{vocab} {name}": errors(mesh, vocab, jnp.float32)
        for vocab in (48, 50)
        for name, mesh in meshes.items()
    }
    result["bfloat16"] = errors(meshes["data=2,fsdp=4"], 48, jnp.bfloat16)
    cross_entropy.CHUNK = 64
    result["shapes"] = shapes(meshes["fsdp=2,expert=4"], 16392, 600)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
