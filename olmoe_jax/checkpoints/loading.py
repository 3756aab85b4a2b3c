"""Building models: parameters from a checkpoint or from a seed, straight into their shards."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.checkpoints.peft import read_adapter
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import Olmoe, graph_of, parameter_specs
from olmoe_jax.model.lora import is_target
from olmoe_jax.model.parameters import ROUTER, Parameters, ParameterSpec, merge, split
from olmoe_jax.model.tuned import NAMES, places
from olmoe_jax.ops.quantization import Quantized, Scheme, quantize, quantized_shapes
from olmoe_jax.parallel import sharding


def random_parameters(
    config: ModelConfig, settings: ModelSettings, seed: int, mesh, wanted: Callable[[str], bool]
) -> Parameters:
    """The `wanted` parameters (by name), float32, drawn from `seed` and made in their shards.

    The mesh changes no value, and neither does what else is wanted.
    """
    specs = parameter_specs(config, settings)
    shardings = sharding.parameter_shardings(
        {name: spec for name, spec in specs.items() if wanted(name)}, mesh
    )

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(key):
        drawn = split(Olmoe(config, settings, rngs=nnx.Rngs(params=key)))[1]
        return {name: drawn[name] for name in shardings}

    return init(jax.random.key(seed))


def load_parameters(
    source: Source,
    mesh,
    dtype: Callable[[str], DTypeLike] = lambda name: jnp.float32,
    quantization: Scheme | None = None,
) -> Parameters:
    """A checkpoint's parameters, sharded; each process reads only its own experts.

    Args:
      source: the checkpoint.
      mesh: where they go.
      dtype: gives the dtype in which to keep a parameter, by name.
      quantization: of the matrices that can have an adapter (`is_target`), whatever `dtype` says.
    """
    specs = parameter_specs(source.config)
    shardings = sharding.parameter_shardings(specs, mesh)

    def load(row: names.Row):
        spec = specs[row.ours]
        if quantization and is_target(row.ours):
            return _load_quantized(
                source, row, quantization, quantized_like(spec, quantization, mesh)
            )
        read = functools.partial(source.read, row)
        shard = functools.partial(_read_shard, read, source.config, row, np.dtype(dtype(row.ours)))
        return jax.make_array_from_callback(spec.shape, shardings[row.ours], shard)

    return {row.ours: load(row) for row in names.rows(source.config)}


def quantized_like(spec: ParameterSpec, scheme: Scheme, mesh) -> Quantized:
    """Shapes, dtypes and shardings of a quantized parameter: its axes', as far as they divide."""

    def place(part):
        where = NamedSharding(mesh, sharding.partition_spec(part.shape, spec.axes, mesh))
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)

    return jax.tree.map(place, quantized_shapes(spec.shape, scheme))


def _load_quantized(source: Source, row: names.Row, scheme: Scheme, like: Quantized) -> Quantized:
    """A parameter of which the host never holds more than one layer before quantization."""

    @functools.cache  # for codes and scales, and all devices
    def layer_part(layer: int, *experts: tuple[int, int]) -> Quantized:
        return quantize(source.read(row, layer, *(slice(*bounds) for bounds in experts)), scheme)

    def load(part: str) -> jax.Array:
        def read(layer: int, *experts: slice) -> np.ndarray:
            bounds = (chosen.indices(source.config.num_experts)[:2] for chosen in experts)
            return getattr(layer_part(layer, *bounds), part)

        shape = getattr(like, part)
        shard = functools.partial(_read_shard, read, source.config, row, np.dtype(shape.dtype))
        return jax.make_array_from_callback(shape.shape, shape.sharding, shard)

    return Quantized(load("codes"), load("scales"), like.width)


def stack_tuned(parameters: Parameters, tuned_experts: tuple[tuple[int, ...], ...]) -> Parameters:
    """ESFT's pack (`tuned.gate`, …) with the base's weights as its first values."""
    if not any(tuned_experts):
        return {}
    layers, experts = np.array(places(tuned_experts)).T
    return {
        f"tuned.{name}": parameters[f"layers.moe.experts.{name}"][layers, experts] for name in NAMES
    }


def load_tuned(source: Source, tuned_experts: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    """As `stack_tuned`, float32 on the host, straight from a checkpoint."""
    rows = {names.tuned_name(row): row for row in names.TABLE if row.per_expert}
    return {
        name: np.stack(
            [
                source.read(row, layer, slice(expert, expert + 1))[0].astype(np.float32)
                for layer, expert in places(tuned_experts)
            ]
        )
        for name, row in rows.items()
    }


def _read_shard(
    read: Callable[..., np.ndarray], config: ModelConfig, row: names.Row, dtype: np.dtype, index
) -> np.ndarray:
    """The part `index` (a tuple of slices of the stacked shape) of one parameter.

    `read` gives a layer's (and of experts, these): as `Source.read` without the row.
    """
    if not row.per_layer:
        return read(None)[index].astype(dtype)
    layers = range(*index[0].indices(config.num_layers))
    experts, rest = ([index[1]], (slice(None), *index[2:])) if row.per_expert else ([], index[1:])
    out = None
    for position, layer in enumerate(layers):
        part = read(layer, *experts)[rest]
        out = np.empty((len(layers), *part.shape), dtype) if out is None else out
        out[position] = part
    return out


def from_pretrained(
    path_or_hub_id: str | Path,
    mesh=None,
    *,
    settings: ModelSettings | None = None,
    adapter: str | Path | None = None,
) -> Olmoe:
    """The model of a Hugging Face checkpoint (or one of ours).

    Args:
      path_or_hub_id: a directory or a hub id.
      mesh: from `olmoe_jax.parallel.sharding.make_mesh`; None: one device.
      settings: how to compute; float32 by default. The parameters are in the compute dtype, the
        router's in float32.
      adapter: a PEFT adapter of that model, or the LoRA run that made it; it stays beside the
        weights, unmerged.

    Raises:
      UserError: nothing is there, or it is damaged or not an OLMoE model.
    """
    source = open_source(str(path_or_hub_id))
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    settings = settings or ModelSettings()

    def dtype(name: str) -> DTypeLike:
        return jnp.float32 if name == ROUTER else settings.compute_dtype

    added = {}
    if adapter is not None:
        lora, added = read_adapter(adapter, source.config)
        settings = dataclasses.replace(settings, lora=lora)
    shardings = sharding.parameter_shardings(parameter_specs(source.config, settings), mesh)
    parameters = load_parameters(source, mesh, dtype) | {
        name: jax.device_put(value.astype(dtype(name)), shardings[name])
        for name, value in added.items()
    }
    return merge(graph_of(source.config, settings), parameters)
