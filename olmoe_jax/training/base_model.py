"""The model of a run before its parameters exist: where it comes from and how it computes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from olmoe_jax import methods
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.fingerprint import adapter_fingerprint
from olmoe_jax.checkpoints.opening import BASE, check_adapter, open_source, weights_identity
from olmoe_jax.checkpoints.source import Source, read_model_config
from olmoe_jax.config import Config
from olmoe_jax.errors import UserError
from olmoe_jax.methods import Method
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.ops import attention, grouped_matmul
from olmoe_jax.parallel import distributed, sharding


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The base model of a run, and the method that fine-tunes it."""

    config: ModelConfig  # the architecture
    compute: ModelSettings  # how the model computes, without the method's decisions
    method: Method  # what trains, and how the router learns
    source: Source | None  # the base's checkpoint; None: random weights
    files: Path  # the directory with config.json and the generation config
    tokenizer_files: Path  # the directory with the tokenizer

    @property
    def settings(self) -> ModelSettings:
        """How the model computes, the method's decisions included."""
        return self.method.model_settings(self.compute)

    def identity(self) -> dict[str, Any]:
        """Returns what a continued run must find unchanged, the same on every process."""
        weights: dict[str, Any] = {BASE: None, "adapter weights": None}
        if distributed.is_writer():
            adapter = self.method.options.adapter_path
            weights = {
                BASE: weights_identity(self.source) if self.source else None,
                "adapter weights": {"content": adapter_fingerprint(adapter)} if adapter else None,
            }
        # The base is read as a whole: once is enough.
        weights = json.loads(distributed.from_writer("weights", json.dumps(weights)))
        return {"model": dataclasses.asdict(self.config), **weights}


def open_model(config: Config) -> BaseModel:
    """Opens and checks the base model and the method; reads no weight yet.

    Raises:
      UserError: the base is missing or damaged, or the configuration does not fit it.
    """
    options = config.model
    if options.init == "pretrained":
        source = open_source(options.path)
        model_config, files = source.config, source.files
        if adapter := config.method.adapter_path:
            check_adapter(source, options.path, adapter)
    else:
        path = Path(options.config_path or "")
        if not path.is_dir() and (path.name != "config.json" or not path.exists()):
            raise UserError(
                f"model.config_path={path}: no such directory or config.json; write a directory "
                "that holds a config.json"
            )
        source, files = None, path if path.is_dir() else path.parent
        model_config = read_model_config(files)
    check_positions(config, model_config)
    sharding.check_experts(config.mesh.expert, model_config.num_experts)
    tokenizer = config.data.tokenizer_path or options.path
    compute = with_backends(compute_settings(config), model_config, jax.default_backend())
    method = methods.build(config.method, model_config)
    method.check()
    return BaseModel(model_config, compute, method, source, files, directory.resolve(tokenizer))


def check_positions(config: Config, model: ModelConfig) -> None:
    """Raises a `UserError` if rows may be longer than the model has positions."""
    length, positions = config.data.max_seq_length, model.max_position_embeddings
    if length > positions and not config.model.allow_extrapolation:
        raise UserError(
            f"data.max_seq_length={length}: the model has {positions} positions "
            f"(max_position_embeddings of its config.json); write at most {positions}, or "
            "model.allow_extrapolation=true"
        )


def compute_settings(config: Config) -> ModelSettings:
    """Returns how the configuration asks the model to compute, without the method's decisions."""
    return ModelSettings(
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        grouped_matmul=config.model.grouped_matmul,
        attention=config.model.attention,
    )


def with_backends(settings: ModelSettings, model: ModelConfig, platform: str) -> ModelSettings:
    """Returns the settings with the backends that are left to the platform ("cpu", "gpu", "tpu").

    Raises:
      UserError: a backend that was chosen, or is the platform's, cannot run there.
    """
    return dataclasses.replace(
        settings,
        grouped_matmul=grouped_matmul.check_backend(settings.grouped_matmul, platform),
        attention=attention.check_backend(
            settings.attention, platform, model.head_dim, settings.compute_dtype
        ),
    )
