"""Text from a model: batched decoding with a KV cache, one compiled prefill and decode loop.

Shapes: B prompts, P prompt columns (padded on the left), N new tokens, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.errors import UserError
from olmoe_jax.model.olmoe import KVCache, Olmoe
from olmoe_jax.model.parameters import Parameters, merge, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST_PROMPT = 32


def generate(
    model: Olmoe,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """The model's continuations of the prompts, without the prompts and the end-of-text token.

    Args:
      model: from `olmoe_jax.from_pretrained`.
      tokenizer: the model's; its eos token ends a text.
      prompts: non-empty texts.
      max_new_tokens: a text that has not ended by then is cut.
      temperature: 0 takes the most probable token; above, tokens are drawn from
        softmax(logits / temperature).
      seed: of the draws.
      batch_size: prompts decoded together.

    Raises:
      UserError: a prompt is empty.
    """
    graph, parameters = split(model)
    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    if not all(encoded):
        raise UserError("a prompt is empty; write at least one word")
    texts: list[str] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        tokens, segments = _left_padded(batch, tokenizer.eos_token_id)
        new = _decode(
            graph,
            parameters,
            tokens,
            segments,
            jax.random.fold_in(jax.random.key(seed), start),
            jnp.float32(temperature),
            max_new_tokens,
            tokenizer.eos_token_id,
        )
        for row in np.asarray(new)[: len(batch)]:
            ended = np.flatnonzero(row == tokenizer.eos_token_id)
            texts.append(tokenizer.decode(row[: ended[0]] if len(ended) else row))
    return texts


def _left_padded(prompts: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [B, P]; P is a power of two, so that few programs are compiled."""
    longest, length = max(map(len, prompts)), _SHORTEST_PROMPT
    while length < longest:
        length *= 2
    tokens = np.full((len(prompts), length), pad, np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _decode(
    graph: nnx.GraphDef,
    parameters: Parameters,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    max_new_tokens: int,
    eos: int,
) -> jax.Array:
    """New tokens [B, N]; after a row's eos it is all eos. Stops when every row has ended."""
    model: Olmoe = merge(graph, parameters)
    batch, length = tokens.shape
    lengths = segments.sum(axis=1)
    positions = jnp.maximum(0, jnp.cumsum(segments, axis=1) - 1)
    cache = model.empty_cache(batch, length + max_new_tokens)
    logits, cache = model.decode(tokens, segments, positions, cache)

    def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
        drawn = jax.random.categorical(
            jax.random.fold_in(key, index), logits / jnp.maximum(temperature, 1e-6)
        )
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    def unfinished(carry):
        _, new, index, _ = carry
        last = jax.lax.dynamic_index_in_dim(new, index - 1, axis=1, keepdims=False)
        return (index < max_new_tokens) & jnp.any(last != eos)

    def one_token(carry: tuple[KVCache, jax.Array, jax.Array, jax.Array]):
        cache, new, index, ended = carry
        last = jax.lax.dynamic_slice_in_dim(new, index - 1, 1, axis=1)
        position = (lengths + index - 1)[:, None]
        logits, cache = model.decode(last, jnp.ones_like(last), position, cache)
        token = jnp.where(ended, eos, choose(logits, index))
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], index, axis=1)
        return cache, new, index + 1, ended | (token == eos)

    first = choose(logits, jnp.int32(0))
    new = jnp.full((batch, max_new_tokens), eos, jnp.int32).at[:, 0].set(first)
    carry = (cache, new, jnp.int32(1), first == eos)
    return jax.lax.while_loop(unfinished, one_token, carry)[1]
