"""A layer's matrices that are read, and their gradients added, where all layers' matrices lie.

XLA's loops over groups take whole arrays: a loop over the matrices of a layer, which itself is a
slice of a stack, would begin with a copy of the slice.
"""

from typing import Any, NamedTuple

import jax


class InStack(NamedTuple):
    """The matrices [E, D, F] of one layer in the stack of all layers."""

    matrices: Any  # [L, E, D, F]: an array, or a ref
    layer: jax.Array  # [] int32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's matrices: E, D, F."""
        return self.matrices.shape[1:]

    def matrix(self, group: jax.Array) -> jax.Array:
        """Returns one matrix [D, F], as it is stored. The group must exist: the index is cut."""
        return self.matrices.at[self.layer, group].get(mode="clip")

    def sliced(self) -> jax.Array:
        """Returns a copy of the layer's matrices [E, D, F]."""
        return jax.lax.dynamic_index_in_dim(self.matrices, self.layer, keepdims=False)
