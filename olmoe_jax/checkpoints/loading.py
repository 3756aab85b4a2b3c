"""Parameters and models: from a checkpoint or from a seed, straight into the devices' shards."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.merging import with_router
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.opening import check_adapter, open_source
from olmoe_jax.checkpoints.peft import read_adapter
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import Olmoe, graph_of, parameter_specs
from olmoe_jax.model.lora import is_target
from olmoe_jax.model.parameters import ROUTER, Parameters, ParameterSpec, merge, split
from olmoe_jax.model.tuned import HOLDERS, places
from olmoe_jax.ops.quantization import Quantized, Scheme, quantize, quantized_shapes
from olmoe_jax.parallel import sharding


def from_pretrained(
    path_or_hub_id: str | Path,
    mesh: Mesh | None = None,
    *,
    settings: ModelSettings | None = None,
    adapter: str | Path | None = None,
    base: str | None = None,
) -> Olmoe:
    """Returns the model of a checkpoint.

    Args:
      path_or_hub_id: a Hugging Face checkpoint's directory or hub id, a training run's directory,
        or the output of `convert.from_hf`.
      mesh: from `olmoe_jax.parallel.sharding.make_mesh`; None: one device.
      settings: how to compute; float32 by default. The parameters are in the compute dtype, the
        router's in float32.
      adapter: a PEFT adapter of that model, or the LoRA run that made one. The adapter stays
        beside the weights, unmerged.
      base: of a training run: where its base lies now; None: where it lay.

    Raises:
      UserError: the checkpoint or adapter is missing, damaged or not an OLMoE model's, or the
        checkpoint has the adapter merged.
    """
    source = open_source(str(path_or_hub_id), base=base)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    settings = settings or ModelSettings()
    compute_dtype = settings.compute_dtype

    def dtype(name: str) -> DTypeLike:
        return jnp.float32 if name == ROUTER else compute_dtype

    added: dict[str, np.ndarray] = {}
    if adapter is not None:
        check_adapter(source, str(path_or_hub_id), adapter)
        lora, added = with_router(*read_adapter(adapter, source.config), source)
        settings = dataclasses.replace(settings, lora=lora)
    shardings = sharding.parameter_shardings(parameter_specs(source.config, settings), mesh)
    # A router that trained beside the adapter replaces the checkpoint's.
    parameters = load_parameters(source, mesh, dtype) | {
        name: jax.device_put(value.astype(dtype(name)), shardings[name])
        for name, value in added.items()
    }
    return merge(graph_of(source.config, settings), parameters)


def load_parameters(
    source: Source,
    mesh: Mesh,
    dtype: Callable[[str], DTypeLike] = lambda name: jnp.float32,
    quantization: Scheme | None = None,
) -> Parameters:
    """Loads a checkpoint's parameters into their shards.

    Each process reads only its own experts, one layer's weight at a time.

    Args:
      source: the checkpoint.
      mesh: the devices.
      dtype: returns the dtype in which to keep a parameter, by name.
      quantization: how to keep the matrices that can have an adapter (`is_target`), in the place
        of `dtype`; None: not quantized.
    """
    specs = parameter_specs(source.config)
    shardings = sharding.parameter_shardings(specs, mesh)

    def load(weight: Weight) -> jax.Array | Quantized:
        name = weight.name
        if quantization and is_target(name):
            like = quantized_like(specs[name], quantization, mesh)
            return _load_quantized(source, weight, quantization, like)
        like = jax.ShapeDtypeStruct(specs[name].shape, dtype(name), sharding=shardings[name])
        return _stack_layers(functools.partial(source.read, weight), weight, like)

    return {weight.name: load(weight) for weight in names.weights(source.config)}


def _load_quantized(source: Source, weight: Weight, scheme: Scheme, like: Quantized) -> Quantized:
    """Loads a parameter and quantizes it, one layer at a time: the host holds no more."""

    # Codes and scales come from the same layer, and several devices ask for the same one.
    @functools.cache
    def quantized_layer(layer: int | None, first: int, stop: int) -> Quantized:
        return quantize(source.read(weight, layer, slice(first, stop)), scheme)

    def load(part: str) -> jax.Array:
        def read(layer: int | None, experts: slice) -> np.ndarray:
            first, stop, _ = experts.indices(source.config.num_experts)
            return getattr(quantized_layer(layer, first, stop), part)

        return _stack_layers(read, weight, getattr(like, part))

    return Quantized(load("codes"), load("scales"), like.width)


def quantized_like(spec: ParameterSpec, scheme: Scheme, mesh: Mesh) -> Quantized:
    """Returns the shapes, dtypes and shardings of a quantized parameter.

    Codes and scales are sharded along the parameter's axes, as far as the mesh divides them.
    """

    def place(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, sharding.partition_spec(part.shape, spec.axes, mesh))
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)

    return jax.tree.map(place, quantized_shapes(spec.shape, scheme))


def _stack_layers(
    read: Callable[[int | None, slice], np.ndarray], weight: Weight, like: jax.ShapeDtypeStruct
) -> jax.Array:
    """Stacks a weight's layers into an array like `like`, each device's shard by itself.

    `read` takes a layer and experts, as `Source.read` does.
    """

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if not weight.per_layer:
            return read(None, slice(None))[index].astype(like.dtype)
        ranges = [range(*part.indices(n)) for part, n in zip(index, like.shape, strict=True)]
        # `read` takes the experts out already.
        experts, rest = slice(None), index[1:]
        if weight.per_expert:
            experts, rest = index[1], (slice(None), *index[2:])
        out = np.empty([len(part) for part in ranges], like.dtype)
        for position, layer in enumerate(ranges[0]):
            out[position] = read(layer, experts)[rest]
        return out

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def load_tuned(source: Source, tuned_experts: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    """Reads the first values of the tuned experts from the base, float32 on the host.

    Returns:
      `tuned.gate`, `tuned.up` [U, D, F] and `tuned.down` [U, F, D], the U experts of all layers.
    """

    def read(weight: Weight, layer: int, expert: int) -> np.ndarray:
        return source.read(weight, layer, slice(expert, expert + 1))[0].astype(np.float32)

    chosen = places(tuned_experts)
    return {
        HOLDERS[weight.name]: np.stack([read(weight, *place) for place in chosen])
        for weight in names.TABLE
        if weight.per_expert
    }


def stack_tuned(parameters: Parameters, tuned_experts: tuple[tuple[int, ...], ...]) -> Parameters:
    """Returns the first values of the tuned experts (see `load_tuned`) from a base on devices.

    No tuned experts give no parameters.
    """
    if not any(tuned_experts):
        return {}
    layers, experts = np.array(places(tuned_experts)).T
    return {stack: parameters[name][layers, experts] for name, stack in HOLDERS.items()}


def random_parameters(
    config: ModelConfig,
    settings: ModelSettings,
    seed: int,
    mesh: Mesh,
    wanted: Callable[[str], bool],
) -> Parameters:
    """Draws the `wanted` parameters (by name) from `seed`, float32, in their shards.

    The mesh changes no value. Neither does the choice of the other parameters.
    """
    specs = parameter_specs(config, settings)
    shardings = sharding.parameter_shardings(
        {name: spec for name, spec in specs.items() if wanted(name)}, mesh
    )

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(key: jax.Array) -> Parameters:
        drawn = split(Olmoe(config, settings, rngs=nnx.Rngs(params=key)))[1]
        return {name: drawn[name] for name in shardings}

    return init(jax.random.key(seed))
