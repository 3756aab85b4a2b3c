"""Parameters: declared once, with shape, logical axes and initialiser.

The trainer, the checkpoints, the sharding and the conversion all see a model's parameters as a
flat dict {"layers.moe.experts.gate": array [L, E, D, F], …}; `split` and `merge` go back and forth.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Parameters = dict[str, jax.Array]
"""Frozen matrices may be `olmoe_jax.ops.quantization.Quantized` instead of arrays."""

ROUTER = "layers.moe.router"
"""The router: small and easily upset, hence float32 whatever the compute dtype."""


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """Shape and logical axis names (see `olmoe_jax.parallel.sharding.RULES`) of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def weight(rngs: nnx.Rngs, axes: dict[str, int], std: float) -> nnx.Param:
    """Declares a weight drawn from N(0, std^2), float32; `axes` maps logical axes to sizes."""
    shape = tuple(axes.values())
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=tuple(axes))


def norm_scale(axes: dict[str, int]) -> nnx.Param:
    """Declares the weight of an RMSNorm: ones, float32."""
    return nnx.Param(jnp.ones(tuple(axes.values()), jnp.float32), axes=tuple(axes))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """Splits a model into its structure and a flat dict of arrays."""
    graph, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    return graph, {".".join(map(str, path)): variable[...] for path, variable in flat}


def merge(graph: nnx.GraphDef, parameters: Parameters) -> Any:
    """Returns the model that `split` took apart, with these arrays (any dtype) as parameters."""
    # Bare arrays: the structure keeps each parameter's declaration (its axes).
    flat = [(tuple(name.split(".")), value) for name, value in parameters.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def specs(model_function: Callable[[], nnx.Module]) -> dict[str, ParameterSpec]:
    """Returns the shapes and axes of the parameters of the model that `model_function()` makes.

    Computes and allocates nothing.
    """
    state = nnx.state(nnx.eval_shape(model_function), nnx.Param)
    return {
        ".".join(map(str, path)): ParameterSpec(
            tuple(variable.shape), variable.get_metadata("axes")
        )
        for path, variable in nnx.to_flat_state(state)
    }


def count_parameters(parameters: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Returns how many numbers of each parameter the model computes with.

    Tuned experts (`tuned.*`) are experts of the base, whose arrays hold their values a second time.
    The base's experts count without them, so that a model of tuned experts has as many parameters
    as its base.

    Args:
      parameters: all parameters of a model, trained and frozen; arrays or their shapes.
    """
    counts = {name: math.prod(value.shape) for name, value in parameters.items()}
    for name in parameters:
        part, _, matrix_name = name.partition(".")
        if part == "tuned":
            counts[f"layers.moe.experts.{matrix_name}"] -= counts[name]
    return counts


def split_trained(
    trains: Callable[[str], bool], parameters: Parameters
) -> tuple[Parameters, Parameters]:
    """Splits parameters by name into those that train and those that keep their values."""
    trained = {name: value for name, value in parameters.items() if trains(name)}
    return trained, {name: value for name, value in parameters.items() if name not in trained}
