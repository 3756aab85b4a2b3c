"""Batched decoding with a KV cache: a compiled prefill, then a compiled loop over tokens.

Shapes: B rows, P prompt columns (padded on the left), N new tokens, V vocabulary.

Sizes are rounded up (`bucket`), so that many prompts share few programs. The loop runs on the
devices for TOKENS_PER_LOOP tokens; then the host looks for stop strings.
"""

import functools
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from olmoe_jax.data.tokenizer import check_vocabulary
from olmoe_jax.errors import UserError
from olmoe_jax.generation.sampling import Kind, Numbers, Sampling, sample
from olmoe_jax.generation.stop_strings import cut_at
from olmoe_jax.model.decoder import KVCache, Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.parallel.sharding import active_mesh, gathered, shard_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_LOOP = 16
_SHORTEST = 32
"""The fewest prompt columns, and columns for new tokens."""
_NEW_TOKENS = 256
"""How many new tokens a text has at most where nobody says."""
NOT_FINITE = (
    "the model gives NaN or infinite logits: its weights hold such values, or overflow in the "
    "compute dtype; take another checkpoint, or compute in float32"
)


class _State(NamedTuple):
    """The state that the loop carries from token to token."""

    cache: KVCache
    new: jax.Array  # [B, N] int32; after a row's end only ends[0]
    count: jax.Array  # [] int32: filled columns of `new`
    ended: jax.Array  # [B] bool
    lengths: jax.Array  # [B] int32: tokens of the prompts
    keys: jax.Array  # [B] random keys, one for each row
    finite: jax.Array  # [] bool: all logits so far, but those of rows that had ended, were finite


def generate(
    model: Olmoe,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    allow_extrapolation: bool = False,
    ends: Collection[int] | None = None,
    watch: Callable[[str], object] | None = None,
) -> list[str]:
    """Returns the model's continuations, without the prompts and the end-of-text token.

    The draws for a prompt depend on the seed and on the prompt's place among the prompts, not on
    the other prompts of its batch. Under `jax.set_mesh` the devices share the rows of a batch.
    Processes that share a mesh call this function with the same prompts, and each gets all texts.

    Args:
      model: from `olmoe_jax.from_pretrained`.
      tokenizer: the model's.
      prompts: non-empty texts.
      max_new_tokens: the length at which a text is cut; None: 256, or where the model's positions
        end.
      temperature, top_p, top_k, seed: see `Sampling`.
      stop: strings that end a text, which is cut before the first of them.
      batch_size: prompts decoded together.
      progress: shows a bar.
      allow_extrapolation: decodes beyond the model's positions (max_position_embeddings).
      ends: the token ids that end a text; None: the tokenizer's eos.
      watch: called with a batch's first text as far as it is written, every few tokens. What it
        raises ends the decoding.

    Raises:
      UserError: a prompt is empty, too long or of another model's tokenizer, a number is out of
        range, there is a text in the place of a list, or the model gives NaN.
    """
    for name, given in {"prompts": prompts, "stop": stop}.items():
        if isinstance(given, str):  # which is a sequence of texts too, its characters
            raise UserError(f"{name} is one text; write a list of texts")
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be 1 or more")
    sampling = Sampling(temperature, top_p, seed, top_k)
    if not all(stop):
        raise UserError("a stop string is empty; leave it out")
    encoded = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
    if not all(encoded):
        raise UserError("a prompt is empty; write at least one word")
    check_vocabulary(max(map(max, encoded), default=0), model.config.vocab_size)
    positions = sys.maxsize if allow_extrapolation else model.config.max_position_embeddings
    rooms = [positions - len(tokens) for tokens in encoded]
    for number, (tokens, room) in enumerate(zip(encoded, rooms, strict=True), 1):
        if room < (max_new_tokens or 1):
            raise UserError(
                f"prompt {number} has {len(tokens)} tokens: of the model's {positions} positions "
                f"{max(0, room)} are left for new tokens; write a shorter prompt or a smaller "
                "max_new_tokens, or allow_extrapolation to decode beyond them"
            )

    # Prompts of similar length share a batch, the longest first: short memory shows at once.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    ends = tuple(sorted({tokenizer.eos_token_id} if ends is None else ends))
    decoder = _Decoder(model, tokenizer, stop, ends, sampling, watch)
    texts = [""] * len(encoded)
    with tqdm(total=len(encoded), unit="prompt", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [encoded[index] for index in indices]
            limits = [min(max_new_tokens or _NEW_TOKENS, rooms[index]) for index in indices]
            found = decoder.run(indices, batch, limits, batch_size, bar.update)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
    return texts


def bucket(size: int, smallest: int = 1) -> int:
    """Returns the next of 1, 2, 3, 4, 6, 8, 12, 16, … times `smallest`."""
    whole = smallest
    while whole < size:
        whole *= 2
    between = whole // 4 * 3
    return between if smallest < between and size <= between else whole


class _Decoder:
    """A model, with everything that its batches share."""

    def __init__(
        self,
        model: Olmoe,
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str],
        ends: tuple[int, ...],
        sampling: Sampling,
        watch: Callable[[str], object] | None,
    ):
        self._watch = watch
        self._graph, parameters = split(model)
        self._parameters = _replicated(parameters)
        self._tokenizer, self._stop, self._ends = tokenizer, tuple(stop), ends
        self._kind, self._key = sampling.kind, jax.random.key(sampling.seed)
        self._numbers = sampling.numbers

    def run(
        self,
        indices: Sequence[int],
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        batch_size: int,
        done: Callable[[int], object],
    ) -> list[str]:
        """Returns the texts of one batch.

        Args:
          indices: the places of the batch's prompts among all prompts, which seed their draws.
          prompts: the tokens of each.
          limits: the most new tokens of each text.
          batch_size: rows of a full batch.
          done: called with n when n more rows have ended.
        """
        # Pad the batch, and run the prompts.
        ends, mesh = self._ends, active_mesh()
        devices = 1 if mesh is None else mesh.size
        rows = min(bucket(len(prompts)), max(batch_size, len(prompts)))
        rows = -(-rows // devices) * devices
        tokens, segments = _left_padded(prompts, rows, ends[0])
        seeds = np.zeros(rows, np.uint32)
        seeds[: len(indices)] = indices
        longest, limit_of_row = max(limits), np.zeros(rows, np.int32)
        limit_of_row[: len(limits)] = limits
        state = _prefill(
            self._graph,
            self._kind,
            bucket(longest, _SHORTEST),
            ends,
            self._parameters,
            tokens,
            segments,
            self._key,
            seeds,
            self._numbers,
        )

        # Decode TOKENS_PER_LOOP tokens at a time, until every row has ended.
        stopped, running, until = np.zeros(rows, bool), len(prompts), 1
        while True:
            new, count, ended = (np.asarray(part) for part in (state.new, state.count, state.ended))
            if not state.finite:
                raise UserError(NOT_FINITE)
            if self._watch:
                self._watch(cut_at(self._text(new[0, : min(count, limits[0])]), self._stop))
            if self._stop:
                stopped |= [self._has_stop(row) for row in new[:, :count]]
            ended = ended | stopped | (count >= limit_of_row)
            still = rows - int(ended.sum())
            done(running - still)
            running = still
            if not still:
                break
            until = min(until + TOKENS_PER_LOOP, longest)
            state = _continue(
                self._graph, self._kind, ends, self._parameters, state, ended, until, self._numbers
            )
        found = zip(new[: len(prompts), :count], limits, strict=True)
        return [cut_at(self._text(row[:limit]), self._stop) for row, limit in found]

    def _has_stop(self, tokens: np.ndarray) -> bool:
        text = self._text(tokens)
        return any(string in text for string in self._stop)

    def _text(self, tokens: np.ndarray) -> str:
        """Returns the text before the first token that ends one."""
        found = np.flatnonzero(np.isin(tokens, self._ends))
        return self._tokenizer.decode(tokens[: found[0]] if len(found) else tokens)


def _replicated(parameters: Parameters) -> Parameters:
    """Returns the parameters with all but the experts, most of the memory, on every device.

    Each device needs the other parameters at every token. Quantized matrices stay split too.
    """
    if active_mesh() is None:
        return parameters
    needed = {
        name: value
        for name, value in parameters.items()
        if ".experts." not in name and not isinstance(value, Quantized)
    }
    # The experts do not pass through this program, which would return a copy of them.
    return parameters | _all_gathered(needed)


@jax.jit
def _all_gathered(parameters: Parameters) -> Parameters:
    return jax.tree.map(gathered, parameters)


def _left_padded(
    prompts: Sequence[list[int]], rows: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segments [B, P]; rows beyond the prompts hold only padding."""
    length = bucket(max(map(len, prompts)), _SHORTEST)
    tokens = np.full((rows, length), pad, np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def forward_program(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Returns `jax.jit` with `options`, for functions without gradients.

    On CPUs the programs compile without one of XLA's passes. The decorated function has an
    attribute `program`: program(platform) is the jitted function.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.cache
        def program(platform: str) -> Any:
            # A CPU computes in float32. This pass moves the conversion of bfloat16 weights out of
            # the loops over layers and experts: the program then holds a float32 copy of all
            # experts, twice their bytes (tests/generation/test_generation.py looks for this copy).
            without = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
            return jax.jit(
                function, compiler_options=without if platform == "cpu" else None, **options
            )

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return program(jax.default_backend())(*arguments)

        call.program = program
        return call

    return decorate


@forward_program(static_argnums=(0, 1, 2, 3))
def _prefill(
    graph: nnx.GraphDef,
    kind: Kind,
    room: int,
    ends: tuple[int, ...],
    parameters: Parameters,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    seeds: jax.Array,
    numbers: Numbers,
) -> _State:
    """Returns the state after the prompts [B, P] and one new token.

    `room` is N; `seeds` [B] uint32 make each row's key out of `key`. Rows without a prompt have
    ended.
    """
    model: Olmoe = merge(graph, parameters)
    batch = len(tokens)
    tokens, segments = shard_batch(tokens), shard_batch(segments)
    positions = jnp.maximum(0, jnp.cumsum(segments, axis=1) - 1)
    logits, cache = model.prefill(tokens, segments, positions, room)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)
    first = sample(kind, logits, keys, jnp.int32(0), numbers)
    lengths = segments.sum(axis=1)
    ended = lengths == 0
    finite = jnp.all(jnp.isfinite(logits) | ended[:, None])
    ended |= jnp.isin(first, jnp.array(ends))
    end = ends[0]
    new = jnp.full((batch, room), end, jnp.int32).at[:, 0].set(jnp.where(ended, end, first))
    return _readable(_State(cache, new, jnp.int32(1), ended, lengths, keys, finite))


@forward_program(static_argnums=(0, 1, 2), donate_argnums=(4,))
def _continue(
    graph: nnx.GraphDef,
    kind: Kind,
    ends: tuple[int, ...],
    parameters: Parameters,
    state: _State,
    ended: jax.Array,
    until: jax.Array,
    numbers: Numbers,
) -> _State:
    """Decodes until there are `until` new tokens or every row has ended.

    `ended` [B] replaces the state's: rows with a stop string have ended too.
    """
    model: Olmoe = merge(graph, parameters)
    layers = model.decoding_layers(len(ended))

    def unfinished(state: _State) -> jax.Array:
        return (state.count < until) & ~jnp.all(state.ended)

    def one_token(state: _State) -> _State:
        cache, new, count, ended, lengths, keys, finite = state
        last = jax.lax.dynamic_index_in_dim(new, count - 1, axis=1, keepdims=False)
        # A row that has ended counts as padding, for which no expert is read.
        logits, cache = model.decode(
            layers, shard_batch(last), shard_batch(~ended), lengths + count - 1, cache
        )
        finite &= jnp.all(jnp.isfinite(logits) | ended[:, None])
        token = jnp.where(ended, ends[0], sample(kind, logits, keys, count, numbers))
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], count, axis=1)
        ended |= jnp.isin(token, jnp.array(ends))
        return _State(cache, new, count + 1, ended, lengths, keys, finite)

    state = state._replace(ended=gathered(ended))
    # XLA gives the loop's result a sharding of its own, whatever the sharding in the loop is.
    return _readable(jax.lax.while_loop(unfinished, one_token, state))


def _readable(state: _State) -> _State:
    """Returns the state with the small arrays on every device, where every process reads them."""
    read = {name: gathered(getattr(state, name)) for name in ("new", "count", "ended", "finite")}
    return state._replace(**read)
