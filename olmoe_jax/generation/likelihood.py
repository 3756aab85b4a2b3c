"""The log-probabilities of given texts: a compiled forward pass over batches of tokens.

Shapes: B rows, S positions, N scored positions of all rows. Sizes are rounded up to few, as in
`generation`.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.generation.decoding import bucket, forward_program
from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split
from olmoe_jax.ops.cross_entropy import CHUNK
from olmoe_jax.parallel.sharding import active_mesh

_SHORTEST = 32

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, at least one, and of what follows it."""


def log_likelihoods(model: Olmoe, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """log p(continuation | context) of each pair, and whether greedy decoding would write it.

    All pairs are one batch. Those that differ in their last token alone share a row; logits exist
    for the continuations' positions only, CHUNK of them at a time.

    Args:
      model: from `olmoe_jax.from_pretrained`; under `jax.set_mesh` the rows are split over it.
      pairs: tokens; a context must not be empty.
    """
    rows: dict[tuple[int, ...], int] = {}
    places = []  # (row, column) whose logits predict a token of a continuation
    for context, continuation in pairs:
        row = rows.setdefault((*context, *continuation[:-1]), len(rows))
        first = len(context) - 1
        places += [(row, first + index) for index in range(len(continuation))]
    length = bucket(max(map(len, rows)), _SHORTEST)
    mesh = active_mesh()
    devices = 1 if mesh is None else mesh.size
    tokens = np.zeros((-(-bucket(len(rows)) // devices) * devices, length), np.int32)
    segments = np.zeros_like(tokens)
    for text, row in rows.items():
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    room = bucket(len(places), _SHORTEST)
    positions, targets = np.zeros(room, np.int32), np.zeros(room, np.int32)
    positions[: len(places)] = [row * length + column for row, column in places]
    targets[: len(places)] = [token for _, continuation in pairs for token in continuation]
    graph, parameters = split(model)
    scored = _scores(graph, parameters, tokens, segments, positions, targets)
    values, greedy = (np.asarray(part)[: len(places)] for part in scored)
    ends = np.cumsum([len(continuation) for _, continuation in pairs])[:-1]
    return [
        (float(part.sum(dtype=np.float64)), bool(all_.all()))
        for part, all_ in zip(np.split(values, ends), np.split(greedy, ends), strict=True)
    ]


@forward_program(static_argnums=0)
def _scores(
    graph: nnx.GraphDef,
    parameters: Parameters,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [N] of the targets [N] at positions [N] of tokens [B, S], flattened.

    And, [N], whether the target is the most probable token there.
    """
    model: Olmoe = merge(graph, parameters)
    hidden, _ = model.hidden(tokens, segments)
    hidden = hidden.reshape(-1, hidden.shape[-1])[positions]

    def score(at):
        hidden, target = at
        logits = model.logits(hidden[None, None])[0, 0]
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    return jax.lax.map(score, (hidden, targets), batch_size=CHUNK)


def rolling_windows(tokens: Sequence[int], prefix: int, context: int) -> Iterator[Pair]:
    """Pairs whose log-likelihoods add up to that of a text longer than the model's context.

    Each token is predicted once. The first window begins with the token `prefix`, a later one with
    the last token before it; the last one reaches back as far as the model's context does.
    """
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        before = tokens[end - context - 1 : start] if start else [prefix]
        yield before, tokens[start:end]
