"""Expert parallelism: tokens travel to the devices that hold their experts, inside `shard_map`.

Every device of a group gets all tokens of the group, runs its own experts on them and the outputs
are added up where the tokens came from: an all-gather and a reduce-scatter, as in Megatron-LM's
`--moe-token-dispatcher-type=allgather` (https://github.com/NVIDIA/Megatron-LM). No buffer's size
depends on which experts the tokens choose, so that no token is ever dropped.

Shapes: T tokens of a device, n devices of a group, E experts, E/n of them on a device.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The devices along these mesh axes share the experts; without axes, each has all."""

    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """n."""
        return jax.lax.axis_size(self.axes) if self.axes else 1

    def gather(self, x: jax.Array | None) -> jax.Array | None:
        """[T, …] -> [n*T, …], the same on every device; also of random keys."""
        if x is None or not self.axes:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = self.gather(jax.random.key_data(x))
            return jax.random.wrap_key_data(keys, impl=jax.random.key_impl(x))
        return jax.lax.all_gather(x, self.axes, tiled=True)

    def scatter_sum(self, y: jax.Array) -> jax.Array:
        """[n*T, …] -> [T, …], the sum of all devices' values for a device's own tokens."""
        return jax.lax.psum_scatter(y, self.axes, tiled=True) if self.axes else y

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Values for own tokens and all experts [T, E] -> for all tokens and own experts."""
        if not self.axes:
            return values
        return jax.lax.all_to_all(values, self.axes, split_axis=1, concat_axis=0, tiled=True)

    def own(self, experts: jax.Array, num_experts: int) -> jax.Array:
        """Numbers of experts in 0…E as numbers among the own E/n; E/n for "none" and others'."""
        if not self.axes:
            return experts
        count = num_experts // self.size
        local = experts - jax.lax.axis_index(self.axes) * count
        return jnp.where((local >= 0) & (local < count), local, count)
