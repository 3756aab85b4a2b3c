"""How much each expert matters for a task: the base model run over the task's data.

L layers, E experts, K experts per token. Padding counts nowhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax import data
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.parameters import Parameters, merge
from olmoe_jax.training.step import DeviceBatch, place_batch

THRESHOLD = 0.01
"""Probability from which a token counts for an expert (the reference's)."""


def expert_scores(
    graph,
    parameters: Parameters,
    config: ModelConfig,
    mesh: Mesh,
    dataset: data.TokenizedDataset,
    *,
    max_tokens: int,
    max_seq_length: int,
    pack: bool,
    rows_per_device: int,
    pad_id: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], int]:
    """Gate and token scores [L, E], and the number of tokens they are means over.

    Gate score: mean of the expert's softmax probability. Token score: share of the tokens whose
    probability for the expert is at least THRESHOLD, divided by K.

    Args:
      max_tokens: examples are taken in a seeded order until they hold this many.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    enough = int(np.searchsorted(np.cumsum(dataset.lengths[order]), max_tokens)) + 1
    sample = dataset.subset(order[:enough])

    # The counts whole on every device, so that each process can read them.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def count(parameters: Parameters, batch: DeviceBatch):
        _, statistics = merge(graph, parameters).hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        probabilities = jax.nn.softmax(statistics.logits, axis=-1)  # [L, B, S, E]
        probabilities *= (batch.segment_ids > 0)[None, :, :, None]
        return probabilities.sum((1, 2)), jnp.sum(probabilities >= THRESHOLD, (1, 2))

    gate = np.zeros((config.num_layers, config.num_experts))
    token = np.zeros_like(gate)
    with jax.set_mesh(mesh):
        for batch in data.evaluation_batches(
            sample,
            max_seq_length=max_seq_length,
            pack=pack,
            rows_per_batch=rows_per_device * mesh.size,
            pad_id=pad_id,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            part = jax.device_get(count(parameters, place_batch(batch, mesh)))
            gate, token = gate + part[0], token + part[1]
    tokens = int(sample.lengths.sum())
    scores = {"gate": gate / tokens, "token": token / (tokens * config.num_experts_per_token)}
    return scores, tokens
