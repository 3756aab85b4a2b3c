"""A run's first parameters: what trains and what stays, each in the dtype in which it is kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from olmoe_jax.checkpoints.loading import load_parameters, random_parameters
from olmoe_jax.config import Config
from olmoe_jax.methods import Base
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.parameters import ROUTER, Parameters, split_trained
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.parallel import sharding
from olmoe_jax.training.base_model import BaseModel


def kept_dtype(
    trains: Callable[[str], bool], settings: ModelSettings, trained: DTypeLike = jnp.float32
) -> Callable[[str], jnp.dtype]:
    """Returns a function from a parameter's name to the dtype in which it is kept.

    That is `trained` if the parameter trains, else the compute dtype. Gradients add up in their
    parameter's dtype. Float32 in any case are the router, and of what trains the norms, which are
    small, and the embedding, in whose gradient a frequent token's many positions add up.
    """

    def dtype(name: str) -> jnp.dtype:
        if name == ROUTER:
            return jnp.dtype(jnp.float32)
        if not trains(name):
            return jnp.dtype(settings.compute_dtype)
        return jnp.dtype(jnp.float32 if name == "embed" or name.endswith("norm") else trained)

    return dtype


def initial_parameters(
    config: Config, model: BaseModel, mesh: Mesh
) -> tuple[Parameters, Parameters]:
    """Loads or draws the parameters; returns those that train and those that do not.

    Each is sharded as its logical axes say and kept in its `kept_dtype`. Frozen matrices of a
    quantized base are `Quantized`.
    """
    method, settings = model.method, model.settings
    dtype = kept_dtype(method.trains, settings, config.optimizer.gradients_dtype)
    shardings = sharding.parameter_shardings(parameter_specs(model.config, settings), mesh)

    def draw(wanted: Callable[[str], bool]) -> Parameters:
        return random_parameters(model.config, settings, config.train.seed, mesh, wanted)

    if model.source:
        quantization = config.model.base_quantization
        parameters = load_parameters(model.source, mesh, dtype, quantization)
    else:
        parameters = draw(parameter_specs(model.config).__contains__)
    added = method.added_parameters(Base(model.source, parameters, draw))
    parameters |= jax.device_put(added, {name: shardings[name] for name in added})
    parameters = {
        name: value if isinstance(value, Quantized) else value.astype(dtype(name))
        for name, value in parameters.items()
    }
    return split_trained(method.trains, parameters)
