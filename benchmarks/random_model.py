"""Models of random weights, in a Hugging Face directory or on the devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.shapes import Shape

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from olmoe_jax.checkpoints.names import Weight
    from olmoe_jax.model.decoder import Olmoe

_SHARD_BYTES = 5 * 10**9


def write_random_model(path: Path, shape: Shape, dtype: str = "float32") -> None:
    """Writes a Hugging Face directory with weights from N(0, 0.02^2) and norms of ones.

    One layer's weight is in memory at a time.
    """
    import jax.numpy as jnp

    from olmoe_jax.checkpoints import directory, names
    from olmoe_jax.checkpoints.huggingface import write_checkpoint
    from olmoe_jax.model.config import model_config_from_hf

    values = hf_config(shape, dtype)
    config, random = model_config_from_hf(values), np.random.default_rng(0)

    def draw(weight: "Weight", layer: int | None) -> np.ndarray:
        layer_shape = names.layer_shape(weight, config)
        if weight.name.endswith("norm"):
            return np.ones(layer_shape, np.float32)
        return np.float32(0.02) * random.standard_normal(layer_shape, np.float32)

    with directory.new_directory(path) as partial:
        directory.write_json(partial / "config.json", values)
        write_checkpoint(partial, config, draw, lambda _: jnp.dtype(dtype), _SHARD_BYTES)


def hf_config(shape: Shape, dtype: str = "float32") -> dict[str, Any]:
    """Returns the config.json of `write_random_model`."""
    return shape.hf_config() | {"architectures": ["OlmoeForCausalLM"], "torch_dtype": dtype}


def random_model(shape: Shape, mesh: "Mesh") -> "Olmoe":
    """Returns a model with random weights in the shape's compute dtype, made on the devices."""
    import jax.numpy as jnp

    from olmoe_jax.checkpoints.loading import random_parameters
    from olmoe_jax.model.config import ModelSettings, model_config_from_hf
    from olmoe_jax.model.decoder import graph_of, parameter_specs
    from olmoe_jax.model.parameters import ROUTER, merge

    config = model_config_from_hf(shape.hf_config())
    settings = ModelSettings(compute_dtype=jnp.dtype(shape.compute_dtype))
    wanted = parameter_specs(config).__contains__
    parameters = {
        name: value if name == ROUTER else value.astype(settings.compute_dtype)
        for name, value in random_parameters(config, settings, 0, mesh, wanted).items()
    }
    return merge(graph_of(config, settings), parameters)
