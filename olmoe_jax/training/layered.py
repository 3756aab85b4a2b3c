"""A state taken apart by layer: for updates that visit one layer at a time.

A state is a tree whose leaves are scalars (Adam's count) and dicts by parameter name; parameters
are such a state too. What belongs to the layers is stacked over them. Leaves may lie in the host's
memory: what is read comes to the device, what is written goes to where it lies.
"""

from collections.abc import Callable
from typing import Any

import jax

from olmoe_jax.model.parameters import LAYERS, Parameters

Update = Callable[..., tuple[Parameters, Any]]
"""(gradients, parameters, optimizer state[, number of the layer]) -> new parameters and state."""


def _is_dict(tree: Any) -> bool:
    return isinstance(tree, dict)


def split_layers(state: Any) -> tuple[Any, Any]:
    """The part of a state that belongs to layers, and the rest; scalars are in both."""

    def part(wanted: bool):
        def of_leaf(leaf):
            if not _is_dict(leaf):
                return leaf
            return {n: v for n, v in leaf.items() if n.startswith(LAYERS) == wanted}

        return jax.tree.map(of_leaf, state, is_leaf=_is_dict)

    return part(True), part(False)


def join_layers(in_layers: Any, outside: Any) -> Any:
    """The inverse of `split_layers`; scalars are those of `outside`, updated once a step."""
    return jax.tree.map(
        lambda a, b: a | b if _is_dict(a) else b, in_layers, outside, is_leaf=_is_dict
    )


def layer_of(stacked: Any, number: jax.Array) -> Any:
    """One layer of a state, on the device."""

    def read(x):
        return jax.lax.squeeze(
            _fetched(jax.lax.dynamic_slice_in_dim(x, number, 1)), dimensions=(0,)
        )

    def of_leaf(leaf):
        return jax.tree.map(read, leaf) if _is_dict(leaf) else leaf

    return jax.tree.map(of_leaf, stacked, is_leaf=_is_dict)


def with_layer(stacked: Any, layer: Any, number: jax.Array) -> Any:
    """The state with this in one layer's place; scalars stay as they are."""

    def write(x, own):
        return jax.lax.dynamic_update_slice_in_dim(x, _put_back(own[None], x), number, 0)

    def of_leaf(leaf, own):
        return jax.tree.map(write, leaf, own) if _is_dict(leaf) else leaf

    return jax.tree.map(of_leaf, stacked, layer, is_leaf=_is_dict)


def update_fetched(update: Update, gradients: Parameters, state: Any) -> Any:
    """A (parameters, optimizer state) after an update, which sees all of it on the device."""
    return jax.tree.map(_put_back, update(gradients, *jax.tree.map(_fetched, state)), state)


def update_by_layer(
    update: Update, gradients: Parameters, parameters: Parameters, optimizer: Any
) -> tuple[Parameters, Any]:
    """As `update`, which gets one layer after the other, then what lies outside of the layers."""
    state = parameters, optimizer
    (own, in_layers), (outside_own, outside) = split_layers((gradients, state))
    for layers in {len(value) for value in own.values()}:

        def one(number, state):
            new = update(layer_of(own, number), *layer_of(state, number), number)
            return with_layer(state, new, number)

        in_layers = jax.lax.fori_loop(0, layers, one, in_layers)
    return join_layers(in_layers, update_fetched(update, outside_own, outside))


def _fetched(x: jax.Array) -> jax.Array:
    """x in the device's memory."""
    return x if _space(x) == jax.memory.Space.Device else jax.device_put(x, jax.memory.Space.Device)


def _put_back(x: jax.Array, before: jax.Array) -> jax.Array:
    """x, which is on the device, in the memory in which `before` lies."""
    return (
        x if _space(before) == jax.memory.Space.Device else jax.device_put(x, jax.memory.Space.Host)
    )


def _space(x: jax.Array) -> jax.memory.Space:
    return jax.typeof(x).memory_space
