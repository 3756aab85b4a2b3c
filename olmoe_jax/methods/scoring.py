"""Expert scores: how much each expert matters for a task.

Shapes: L layers, B rows, S positions, E experts, K experts per token. Padding does not count.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax import data
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.parameters import Parameters, merge
from olmoe_jax.parallel.batch import DeviceBatch, place_batch

THRESHOLD = 0.01
"""The least probability at which a token counts for an expert (the reference's value)."""


def expert_scores(
    graph: nnx.GraphDef,
    parameters: Parameters,
    config: ModelConfig,
    mesh: Mesh,
    dataset: data.TokenizedDataset,
    *,
    max_tokens: int,
    seed: int,
    layout: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], int]:
    """Runs the base over examples and scores its experts (https://arxiv.org/abs/2407.01906).

    An expert's gate score is the mean of its softmax probability. Its token score is the share of
    the tokens whose probability for the expert is at least THRESHOLD, divided by K.

    Whole examples are taken, in an order by `seed`, until they hold `max_tokens`. `layout` says how
    they become rows, as keyword arguments of `data.evaluation_batches`.

    Returns:
      {"gate": [L, E], "token": [L, E]} float64, and the number of scored tokens.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    enough = int(np.searchsorted(np.cumsum(dataset.lengths[order]), max_tokens)) + 1
    sample = dataset.subset(order[:enough])

    # Every device gets the whole sums, so that each process can read them.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def count(parameters: Parameters, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
        _, statistics = merge(graph, parameters).hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        probabilities = jax.nn.softmax(statistics.logits, axis=-1)  # [L, B, S, E]
        probabilities *= (batch.segment_ids > 0)[None, :, :, None]
        return probabilities.sum((1, 2)), jnp.sum(probabilities >= THRESHOLD, (1, 2))

    gate = np.zeros((config.num_layers, config.num_experts))
    token = np.zeros_like(gate)
    with jax.set_mesh(mesh):
        for batch in data.evaluation_batches(sample, **layout):
            part = jax.device_get(count(parameters, place_batch(batch, mesh)))
            gate, token = gate + part[0], token + part[1]
    tokens = int(sample.lengths.sum())
    scores = {"gate": gate / tokens, "token": token / (tokens * config.num_experts_per_token)}
    return scores, tokens
