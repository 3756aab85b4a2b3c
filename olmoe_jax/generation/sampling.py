"""Sampling: how the next token is taken from the logits.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from olmoe_jax.errors import UserError

Kind = Literal["greedy", "all", "top"]
"""Take the most probable token, draw from all tokens, or draw from the most probable ones."""


class Numbers(NamedTuple):
    """The numbers of `Sampling` on the device, each []."""

    temperature: jax.Array  # float32
    top_p: jax.Array  # float32
    top_k: jax.Array  # int32


@dataclass(frozen=True)
class Sampling:
    """How tokens are taken from the logits: greedily, or drawn from softmax(logits / temperature).

    With top_p below 1 the draws are from the fewest most probable tokens that have this much
    probability together (nucleus sampling, https://arxiv.org/abs/1904.09751). With both top_p and
    top_k, top_p is a share of the probability of the top_k tokens.

    Raises:
      UserError: a number is out of range.
    """

    temperature: float = 0.0  # 0 takes the most probable token
    top_p: float = 1.0  # 1: from all tokens
    seed: int = 0  # of the draws
    top_k: int = 0  # draws from so many most probable tokens; 0: from all tokens

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k}: must be 0 (all tokens) or more")

    @property
    def kind(self) -> Kind:
        """The kind of program: a greedy one needs no random numbers, and "all" sorts nothing."""
        if self.temperature == 0:
            return "greedy"
        return "all" if self.top_p == 1 and self.top_k == 0 else "top"

    @property
    def numbers(self) -> Numbers:
        """The numbers for `sample`. A greedy program divides by no temperature."""
        top_k = self.top_k or 2**31 - 1
        return Numbers(
            jnp.float32(self.temperature or 1), jnp.float32(self.top_p), jnp.int32(top_k)
        )


def sample(
    kind: Kind,
    logits: jax.Array,
    keys: jax.Array,
    count: jax.Array,
    numbers: Numbers,
) -> jax.Array:
    """Returns the next token of each row, [B] int32.

    Args:
      kind: see `Sampling`.
      logits: [B, V] float32.
      keys: [B] random keys, one for each row.
      count: [] int32, the number of the token in its text; each has its own draw.
      numbers: from `Sampling.numbers`.
    """
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers.temperature
    if kind == "top":
        probabilities = jax.nn.softmax(logits)
        descending = -jnp.sort(-probabilities, axis=-1)
        among = jnp.arange(descending.shape[-1]) < numbers.top_k
        share = numbers.top_p * jnp.sum(descending, axis=-1, where=among, keepdims=True)
        # A token stays if the tokens before it have less than top_p: the most probable always does.
        before = jnp.cumsum(descending, axis=-1) - descending
        stays = among & (before < share)
        least = jnp.min(jnp.where(stays, descending, 1.0), axis=-1, keepdims=True)
        logits = jnp.where(probabilities >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
