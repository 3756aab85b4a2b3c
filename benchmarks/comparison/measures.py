"""Measures a model for the comparison: right answers row by row, losses, routing.

Shapes: N rows, L layers, E experts, K experts per token, S positions, V tokens of the vocabulary.
"""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import router_cosine
from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.step import changed_choices

_ROWS = 40  # per batch: every part of a test is a multiple
_LENGTH = 64  # tokens: no row is longer


class Measures(NamedTuple):
    """The measures of a model on the rows of a file."""

    right: np.ndarray  # [N] bool: greedy decoding gives the whole answer
    losses: np.ndarray  # [N]: nats, summed over the tokens of the answer
    targets: np.ndarray  # [N]: how many tokens the answer has, its end included
    load: np.ndarray  # [N, L, E]: how many tokens of the row chose each expert
    choices: list[jax.Array]  # of each batch [L, _ROWS, S, K]: the experts of each token

    @property
    def loss(self) -> float:
        """Returns the mean loss per token of the answers, in nats."""
        return float(self.losses.sum() / self.targets.sum())


def batches(file: Path, tokenizer_files: Path) -> list[DeviceBatch]:
    """Returns a file's rows in batches, one example a row, in the order of the file."""
    return router_cosine.batches(file, tokenizer_files, length=_LENGTH, rows=_ROWS, pack=False)


def measure(model: Olmoe, rows: list[DeviceBatch]) -> Measures:
    """Measures the model on the rows of `batches`."""
    graph, parameters = split(model)
    parts = [_measure(graph, parameters, batch) for batch in rows]
    columns = [np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(4)]
    real = columns[2] > 0  # the last batch is filled up with empty rows
    return Measures(*(column[real] for column in columns), [part[4] for part in parts])


@functools.partial(jax.jit, static_argnums=0)
def _measure(graph: nnx.GraphDef, parameters: Parameters, batch: DeviceBatch) -> tuple:
    model: Olmoe = merge(graph, parameters)
    hidden, statistics = model.hidden(
        batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
    )
    log_probabilities = jax.nn.log_softmax(model.logits(hidden))
    counts = batch.loss_weights > 0
    losses = -jnp.take_along_axis(log_probabilities, batch.targets[..., None], -1)[..., 0]
    # Greedy decoding writes the answer if and only if each of its tokens is the most probable one
    # after those before it.
    right = (log_probabilities.argmax(-1) == batch.targets) | ~counts
    choices = jax.lax.top_k(statistics.logits, model.config.num_experts_per_token)[1]
    chosen = jax.nn.one_hot(choices, model.config.num_experts).sum(3)  # [L, B, S, E]
    load = jnp.einsum("lbse,bs->ble", chosen, (batch.segment_ids > 0).astype(jnp.float32))
    return right.all(1), (losses * counts).sum(1), counts.sum(1), load, choices


def changed_routing(after: Measures, before: Measures, rows: list[DeviceBatch]) -> float:
    """Returns the share of the tokens' experts that were not among their experts before."""
    shares = [
        float(changed_choices(a, b, batch.segment_ids))
        for a, b, batch in zip(after.choices, before.choices, rows, strict=True)
    ]
    tokens = [int((batch.segment_ids > 0).sum()) for batch in rows]
    return float(np.average(shares, weights=tokens))


def without_experts(model: Olmoe, experts: list[Collection[int]]) -> Olmoe:
    """Returns the model with the output of these experts of each layer set to zero."""
    graph, parameters = split(model)
    down = np.array(parameters["layers.moe.experts.down"])
    for layer, numbers in enumerate(experts):
        down[layer, list(numbers)] = 0
    return merge(graph, parameters | {"layers.moe.experts.down": jnp.asarray(down)})
