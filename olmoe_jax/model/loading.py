"""Building models: parameters from a checkpoint or from a seed, straight into their shards."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax import sharding
from olmoe_jax.hf import names
from olmoe_jax.hf.source import Source, open_source
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.olmoe import Olmoe
from olmoe_jax.model.parameters import Parameters, ParameterSpec, merge, split
from olmoe_jax.model.parameters import specs as specs_of


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Name -> shape and logical axes of every parameter of this architecture."""
    return specs_of(lambda: Olmoe(config, rngs=nnx.Rngs(0)))


def graph_of(config: ModelConfig, settings: ModelSettings) -> nnx.GraphDef:
    """The model's structure, to `merge` with parameters; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Olmoe(config, settings, rngs=nnx.Rngs(0))))[0]


def random_parameters(config: ModelConfig, seed: int, mesh) -> Parameters:
    """Float32 parameters drawn from `seed`, made in their shards; the mesh changes no value."""
    shardings = sharding.parameter_shardings(parameter_specs(config), mesh)

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(key):
        return split(Olmoe(config, rngs=nnx.Rngs(params=key)))[1]

    return init(jax.random.key(seed))


def load_parameters(source: Source, mesh, dtype=jnp.float32) -> Parameters:
    """A checkpoint's parameters in `dtype`, sharded; each process reads only its own experts."""
    config = source.config
    specs = parameter_specs(config)
    shardings = sharding.parameter_shardings(specs, mesh)
    return {
        row.ours: jax.make_array_from_callback(
            specs[row.ours].shape,
            shardings[row.ours],
            functools.partial(_read_shard, source, row, np.dtype(dtype)),
        )
        for row in names.rows(config)
    }


def _read_shard(source: Source, row: names.Row, dtype: np.dtype, index) -> np.ndarray:
    """The part `index` (a tuple of slices of the stacked shape) of one parameter."""
    if not row.per_layer:
        return source.read(row, None)[index].astype(dtype)
    layers = range(*index[0].indices(source.config.num_layers))
    experts, rest = ([index[1]], (slice(None), *index[2:])) if row.per_expert else ([], index[1:])
    out = None
    for position, layer in enumerate(layers):
        part = source.read(row, layer, *experts)[rest]
        out = np.empty((len(layers), *part.shape), dtype) if out is None else out
        out[position] = part
    return out


def from_pretrained(
    path_or_hub_id: str | Path, mesh=None, *, settings: ModelSettings | None = None
) -> Olmoe:
    """The model of a Hugging Face checkpoint (or one of ours), float32 parameters.

    Args:
      path_or_hub_id: a directory or a hub id.
      mesh: from `olmoe_jax.sharding.make_mesh`; None: one device.
      settings: how to compute; float32 by default.

    Raises:
      UserError: nothing is there, or it is damaged or not an OLMoE model.
    """
    source = open_source(str(path_or_hub_id))
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    graph = graph_of(source.config, settings or ModelSettings())
    return merge(graph, load_parameters(source, mesh))
