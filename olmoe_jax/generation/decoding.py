"""Text from a model: batched decoding with a KV cache, a compiled prefill and a compiled loop.

Shapes: B rows, P prompt columns (padded on the left), N new tokens, V vocabulary.

Sizes are rounded up to few (`bucket`), so that many prompts need few programs. The loop runs on the
device for CHUNK tokens at a time; in between, the host looks for stop strings.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from olmoe_jax.errors import UserError
from olmoe_jax.generation.stop_strings import cut_at
from olmoe_jax.model.decoder import KVCache, Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.parallel.sharding import active_mesh, gathered, shard_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 16
_SHORTEST = 32


@dataclass(frozen=True)
class Draws:
    """How a token is taken from the logits; the numbers are arguments of the programs.

    Attributes:
      temperature: 0 takes the most probable token; above, draws from softmax(logits / temperature).
      top_p: draws from the fewest most probable tokens that have this much probability together
        (nucleus sampling, https://arxiv.org/abs/1904.09751); 1: from all.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class _State(NamedTuple):
    """What the loop carries from token to token."""

    cache: KVCache
    new: jax.Array  # [B, N] int32; after a row's eos all eos
    count: jax.Array  # [] int32: columns of `new` that are filled
    ended: jax.Array  # [B] bool
    lengths: jax.Array  # [B] int32: tokens of the prompts
    keys: jax.Array  # [B] random keys, one per row


def generate(
    model: Olmoe,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """The model's continuations of the prompts, without the prompts and the end-of-text token.

    What is drawn for a prompt depends on the seed and on its place among the prompts, not on what
    it shares a batch with. Under `jax.set_mesh` the rows of a batch are split over the devices;
    processes that share a mesh ask for the same, and each gets all texts.

    Args:
      model: from `olmoe_jax.from_pretrained`.
      tokenizer: the model's; its eos token ends a text.
      prompts: non-empty texts.
      max_new_tokens: a text that has not ended by then is cut.
      temperature, top_p, seed: see `Draws`.
      stop: strings that end a text, which is cut before the first of them.
      batch_size: prompts decoded together.
      progress: shows a bar.

    Raises:
      UserError: a prompt is empty, or a number out of range.
    """
    _check(max_new_tokens=max_new_tokens, batch_size=batch_size)
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
    if not all(stop):
        raise UserError("a stop string is empty; leave it out")
    encoded = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
    if not all(encoded):
        raise UserError("a prompt is empty; write at least one word")
    decoder = _Decoder(model, tokenizer, stop, Draws(temperature, top_p, seed))
    texts = [""] * len(encoded)
    # Prompts of like length share a batch, the longest first: if memory is short, it shows at once.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    with tqdm(total=len(encoded), unit="prompt", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            prompts_ = [encoded[index] for index in indices]
            batch = decoder.run(indices, prompts_, max_new_tokens, batch_size, bar.update)
            for index, text in zip(indices, batch, strict=True):
                texts[index] = text
    return texts


def bucket(size: int, smallest: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, … times `smallest`."""
    whole = smallest
    while whole < size:
        whole *= 2
    between = whole // 4 * 3
    return between if smallest < between and size <= between else whole


class _Decoder:
    """A model with all that its batches share."""

    def __init__(self, model: Olmoe, tokenizer, stop: Sequence[str], draws: Draws):
        self._graph, parameters = split(model)
        self._parameters = _at_hand(parameters)
        self._tokenizer, self._stop, self._draws = tokenizer, tuple(stop), draws
        # Static, since a greedy program needs no random numbers and a plain draw no sorting.
        self._kind = "greedy" if draws.temperature == 0 else "all" if draws.top_p == 1 else "top_p"
        self._numbers = jnp.float32(draws.temperature or 1), jnp.float32(draws.top_p)

    def run(
        self,
        indices: Sequence[int],
        prompts: Sequence[list[int]],
        limit: int,
        batch_size: int,
        done,
    ) -> list[str]:
        """The texts of one batch; calls done(n) when n more rows have ended."""
        eos = self._tokenizer.eos_token_id
        mesh = active_mesh()
        multiple = 1 if mesh is None else mesh.size
        rows = min(bucket(len(prompts)), max(batch_size, len(prompts)))
        rows = -(-rows // multiple) * multiple
        tokens, segments = _left_padded(prompts, rows, eos)
        seeds = np.array([*indices, *[0] * (rows - len(indices))], np.uint32)
        state = _prefill(
            self._graph,
            self._kind,
            bucket(limit, _SHORTEST),
            eos,
            self._parameters,
            tokens,
            segments,
            jax.random.key(self._draws.seed),
            seeds,
            *self._numbers,
        )
        stopped, running, until = np.zeros(rows, bool), len(prompts), 1
        while True:
            new, count, ended = (np.asarray(part) for part in (state.new, state.count, state.ended))
            if self._stop:
                stopped |= [
                    row < len(prompts)
                    and any(s in self._text(new[row, :count]) for s in self._stop)
                    for row in range(rows)
                ]
            ended = ended | stopped
            still = rows - int(ended.sum())
            done(running - still)
            running = still
            if not still or count >= limit:
                break
            until = min(until + CHUNK, limit)
            state = _continue(
                self._graph, self._kind, eos, self._parameters, state, ended, until, *self._numbers
            )
        done(running)
        return [cut_at(self._text(row), self._stop) for row in new[: len(prompts), :count]]

    def _text(self, tokens: np.ndarray) -> str:
        ends = np.flatnonzero(tokens == self._tokenizer.eos_token_id)
        return self._tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)


def _at_hand(parameters: Parameters) -> Parameters:
    """On every device what each needs at every token; the experts, most of it, stay split."""
    if active_mesh() is None:
        return parameters
    needed = {
        name: value
        for name, value in parameters.items()
        if ".experts." not in name and not isinstance(value, Quantized)
    }
    # Not all parameters: what goes through a program comes out of it as a copy.
    return parameters | _all_gathered(needed)


@jax.jit
def _all_gathered(parameters: Parameters) -> Parameters:
    return jax.tree.map(gathered, parameters)


def _check(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}={value}: must be 1 or more")


def _left_padded(prompts, rows: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [rows, P]; rows past the prompts are all padding."""
    length = bucket(max(map(len, prompts)), _SHORTEST)
    tokens = np.full((rows, length), pad, np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def forward_program(**options):
    """`jax.jit` for what needs no gradients; `program(platform)` of the result is what it compiles.

    A CPU computes in float32: XLA would convert the bfloat16 weights of all layers and experts
    before the loops over them, and hold them three times. There, nothing moves out of a loop.
    """

    def decorate(function):
        @functools.cache
        def program(platform: str):
            without = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
            return jax.jit(
                function, compiler_options=without if platform == "cpu" else None, **options
            )

        @functools.wraps(function)
        def call(*arguments):
            return program(jax.default_backend())(*arguments)

        call.program = program
        return call

    return decorate


@forward_program(static_argnums=(0, 1, 2, 3))
def _prefill(
    graph: nnx.GraphDef,
    kind: str,
    room: int,
    eos: int,
    parameters: Parameters,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    seeds: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> _State:
    """The state after the prompts [B, P] and one new token; rows without prompt have ended."""
    model: Olmoe = merge(graph, parameters)
    batch = len(tokens)
    tokens, segments = shard_batch(tokens), shard_batch(segments)
    positions = jnp.maximum(0, jnp.cumsum(segments, axis=1) - 1)
    logits, cache = model.prefill(tokens, segments, positions, room)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)
    first = choose(kind, logits, keys, jnp.int32(0), temperature, top_p)
    lengths = segments.sum(axis=1)
    ended = (lengths == 0) | (first == eos)
    new = jnp.full((batch, room), eos, jnp.int32).at[:, 0].set(jnp.where(ended, eos, first))
    return _on_all(_State(cache, new, jnp.int32(1), ended, lengths, keys))


@forward_program(static_argnums=(0, 1, 2), donate_argnums=(4,))
def _continue(
    graph: nnx.GraphDef,
    kind: str,
    eos: int,
    parameters: Parameters,
    state: _State,
    ended: jax.Array,
    until: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> _State:
    """Decodes until there are `until` new tokens or every row has ended."""
    model: Olmoe = merge(graph, parameters)
    layers = model.decoding_layers(len(ended))

    def unfinished(state: _State) -> jax.Array:
        return (state.count < until) & ~jnp.all(state.ended)

    def one_token(state: _State) -> _State:
        cache, new, count, ended, lengths, keys = state
        last = jax.lax.dynamic_index_in_dim(new, count - 1, axis=1, keepdims=False)
        # A row that has ended is padding: no expert is read for it.
        logits, cache = model.decode(
            layers, shard_batch(last), shard_batch(~ended), lengths + count - 1, cache
        )
        token = jnp.where(ended, eos, choose(kind, logits, keys, count, temperature, top_p))
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], count, axis=1)
        return _State(cache, new, count + 1, ended | (token == eos), lengths, keys)

    state = state._replace(ended=gathered(ended))
    # The loop's result too: XLA gives it a sharding of its own, whatever the body's has.
    return _on_all(jax.lax.while_loop(unfinished, one_token, state))


def _on_all(state: _State) -> _State:
    """The small arrays on every device, where every host can read them."""
    read = {name: gathered(getattr(state, name)) for name in ("new", "count", "ended")}
    return state._replace(**read)


def choose(
    kind: str,
    logits: jax.Array,
    keys: jax.Array,
    count: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Tokens [B] int32 from logits [B, V]; `kind` is "greedy", "all" or "top_p" (see `Draws`).

    Each row draws with its own key of `keys` [B], folded with the number `count` of the token.
    """
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if kind == "top_p":
        probabilities = jax.nn.softmax(logits)
        descending = -jnp.sort(-probabilities, axis=-1)
        # A token stays while those before it have less than top_p: the most probable always does.
        before = jnp.cumsum(descending, axis=-1) - descending
        least = jnp.min(jnp.where(before < top_p, descending, 1.0), axis=-1, keepdims=True)
        logits = jnp.where(probabilities >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
