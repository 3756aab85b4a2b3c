"""Log-probabilities of given continuations: one compiled forward pass over a batch.

Shapes: B rows, S positions, N scored positions of all rows. B, S and N are rounded up (`bucket`),
so that many batches share few programs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.data.tokenizer import check_vocabulary
from olmoe_jax.errors import UserError
from olmoe_jax.generation.decoding import NOT_FINITE, bucket, forward_program
from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split
from olmoe_jax.ops.cross_entropy import CHUNK
from olmoe_jax.parallel.sharding import active_mesh

_SHORTEST = 32

TokenPair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, at least one, and the tokens of its continuation."""


def log_likelihoods(model: Olmoe, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
    """Returns log p(continuation | context) of each pair, and whether greedy decoding writes it.

    All pairs are one batch. Pairs that differ only in their last token share a row, since a row
    holds all tokens but the last (the choices of a multiple choice question are often one token).

    Args:
      model: from `olmoe_jax.from_pretrained`; under `jax.set_mesh` the devices share the rows.
      pairs: (context, continuation) tokens; a context is not empty.

    Raises:
      UserError: the model does not have a token, or gives NaN.
    """
    if not pairs:
        return []
    largest = max((max(part) for pair in pairs for part in pair if part), default=0)
    check_vocabulary(largest, model.config.vocab_size)
    rows: dict[tuple[int, ...], int] = {}
    places = []  # (row, column) of each hidden state that predicts a token of a continuation
    for context, continuation in pairs:
        row = rows.setdefault((*context, *continuation[:-1]), len(rows))
        places += [(row, len(context) - 1 + index) for index in range(len(continuation))]

    # Pad rows to a multiple of the devices, and all sizes to a bucket.
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
    if not np.isfinite(values).all():
        raise UserError(NOT_FINITE)
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
    """Returns log p of each target [N] float32, and whether it is the most probable token [N] bool.

    tokens and segments are [B, S]; positions [N] count in the flattened [B*S].
    """
    model: Olmoe = merge(graph, parameters)
    hidden, _ = model.hidden(tokens, segments)
    hidden = hidden.reshape(-1, hidden.shape[-1])[positions]  # [N, D]

    def score(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, target = at
        logits = model.logits(hidden[None, None])[0, 0]
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    # CHUNK positions at a time: [N, V] logits of a whole batch would not fit.
    return jax.lax.map(score, (hidden, targets), batch_size=CHUNK)
