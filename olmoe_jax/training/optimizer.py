"""AdamW, learning-rate schedules and gradient clipping, as PyTorch and transformers define them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from olmoe_jax.model.parameters import Parameters
from olmoe_jax.training import eight_bits
from olmoe_jax.training.eight_bits import EightBits, is_eight_bits
from olmoe_jax.training.rounding import join_float32, split_float32, stochastic_round

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    kind: Literal["linear", "cosine", "constant"], peak: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Returns a function from an update's number 0, 1, … to its learning rate, float32.

    The schedules are those of transformers with these names: a linear warmup from 0 (with a warmup,
    the first update has learning rate 0), then linear to 0, half a cosine to 0, or constant.
    """

    def learning_rate(step: jax.Array) -> jax.Array:
        warmup = step / max(1, warmup_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        decay = {
            "linear": jnp.maximum(0.0, 1.0 - progress),
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0))),
            "constant": jnp.float32(1.0),
        }[kind]
        return peak * jnp.where(step < warmup_steps, warmup, decay).astype(jnp.float32)

    return learning_rate


class SplitState(NamedTuple):
    """The state of an optimizer that keeps float32 master weights in two halves."""

    moments: optax.OptState
    remainders: Parameters  # uint16: the lower halves of bfloat16 parameters (`split_float32`)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A direction of descent, computed in float32, and how weights and moments are stored.

    Updates of bfloat16 parameters add up in `master_dtype`: float32 keeps the parameters' lower
    halves in the state, bfloat16 rounds the parameters stochastically.
    """

    # Gives what to subtract from the weights, before the learning rate scales it.
    direction: optax.GradientTransformation
    # float32; or bfloat16 or int8 (`EightBits`), both rounded stochastically.
    moments_dtype: DTypeLike = jnp.float32
    master_dtype: DTypeLike = jnp.float32

    def init(self, parameters: Parameters) -> Any:
        """Returns the state before the first update."""
        in_8_bits = self.moments_dtype == jnp.int8
        dtype = jnp.float32 if in_8_bits else self.moments_dtype
        moments = self.direction.init(
            {name: jnp.zeros(p.shape, dtype) for name, p in parameters.items()}
        )
        if in_8_bits:
            moments = jax.tree_util.tree_map_with_path(_zeros_in_8_bits, moments)
        remainders = {}
        if self.master_dtype == jnp.float32:
            remainders = {
                name: jnp.zeros(p.shape, jnp.uint16)
                for name, p in parameters.items()
                if p.dtype == jnp.bfloat16
            }
        return SplitState(moments, remainders) if remainders else moments

    def update(
        self,
        gradients: Parameters,
        state: Any,
        parameters: Parameters,
        learning_rate: jax.Array,
        key: jax.Array,
    ) -> tuple[Parameters, Any]:
        """Makes an update; returns the parameters and the state in the dtypes that they have.

        `gradients` are float32, and so is the scalar `learning_rate`. `key` is a random key for
        this update alone, which only rounding reads.
        """
        # Widen everything to float32.
        is_split = isinstance(state, SplitState)
        old_moments, remainders = state if is_split else (state, {})
        weights = {
            name: join_float32(p, remainders[name]) if name in remainders else _float32(p)
            for name, p in parameters.items()
        }

        # Update in float32.
        direction, moments = self.direction.update(
            gradients, jax.tree.map(_float32, old_moments, is_leaf=is_eight_bits), weights
        )
        weights = jax.tree.map(lambda w, d: w - learning_rate * d, weights, direction)

        # Store in the dtypes of before.
        moments_key, weights_key = jax.random.split(key)
        scales = None
        if self.moments_dtype == jnp.int8:
            scales = self._scales(gradients, old_moments, weights)
        moments = _stored_as(old_moments, moments, moments_key, scales)
        if not is_split:
            return _stored_as(parameters, weights, weights_key), moments
        halves = {name: split_float32(weights[name]) for name in remainders}
        parameters = weights | {name: upper for name, (upper, _) in halves.items()}
        return parameters, SplitState(moments, {name: low for name, (_, low) in halves.items()})

    def _scales(
        self, gradients: Parameters, old_moments: Any, weights: Parameters
    ) -> list[jax.Array | None]:
        """Returns the scales of each leaf of the new moments, or None for a leaf not in 8 bits.

        Computes the new moments a second time. If one computation served the scales and the codes,
        all moments would wait for their scales in memory, in float32. The barrier keeps XLA from
        joining the two computations.
        """
        again = jax.lax.optimization_barrier(old_moments)
        again = jax.tree.map(_float32, again, is_leaf=is_eight_bits)
        moments = jax.tree.leaves(self.direction.update(gradients, again, weights)[1])
        before = jax.tree.leaves(old_moments, is_leaf=is_eight_bits)
        return [
            eight_bits.scales_of(moment) if is_eight_bits(old) else None
            for moment, old in zip(moments, before, strict=True)
        ]


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _float32(x: jax.Array | EightBits) -> jax.Array:
    if isinstance(x, EightBits):
        return eight_bits.decode(x)
    return x.astype(jnp.float32) if _is_floating(x) else x


def _zeros_in_8_bits(path: tuple, moment: jax.Array) -> jax.Array | EightBits:
    if not _is_floating(moment):
        return moment
    is_second = jax.tree_util.GetAttrKey("nu") in path
    return eight_bits.zeros(moment.shape, jnp.uint8 if is_second else jnp.int8)


def _stored_as(
    old: Any, new: Any, key: jax.Array, scales: list[jax.Array | None] | None = None
) -> Any:
    """Returns `new` with each leaf in the dtype of the same leaf of `old`, rounded stochastically.

    The leaves of `new` are float32, or no floats and stay as they are. `scales` has the scales of
    each leaf in 8 bits and None for the others, or is None if no leaf is in 8 bits.
    """
    leaves, tree = jax.tree.flatten(new)
    keys = jax.random.bits(key, (len(leaves), 2), jnp.uint32)

    def store(value: jax.Array, before: Any, scales: Any, key: jax.Array) -> jax.Array | EightBits:
        if is_eight_bits(before):
            return eight_bits.encode(value, scales, before.codes.dtype, key)
        return value if value.dtype == before.dtype else stochastic_round(value, key)

    before = jax.tree.leaves(old, is_leaf=is_eight_bits)
    scales = scales or [None] * len(leaves)
    return jax.tree.unflatten(tree, map(store, leaves, before, scales, keys))


def adamw(
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    moments_dtype: DTypeLike = jnp.float32,
    master_dtype: DTypeLike = jnp.float32,
) -> Optimizer:
    """Returns AdamW (https://arxiv.org/abs/1711.05101) as PyTorch computes it.

    The weight decay applies to every trained parameter, norms and embeddings too, as in the
    reference. `moments_dtype` and `master_dtype`: see `Optimizer`.
    """
    direction = optax.chain(
        optax.scale_by_adam(beta1, beta2, epsilon), optax.add_decayed_weights(weight_decay)
    )
    return Optimizer(direction, moments_dtype, master_dtype)


def global_norm(gradients: Parameters) -> jax.Array:
    """Returns sqrt of the sum of squares over all gradients, [] float32."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()]
    return jnp.sqrt(sum(squares))


def clip_scale(norm: jax.Array, max_norm: float) -> jax.Array:
    """Returns the factor of PyTorch's clip_grad_norm_: min(1, max_norm / (norm + 1e-6))."""
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))
