"""PEFT's LoRA adapters: directories read into this project's parameters, and written.

An adapter is written with tensors for each expert
(`…mlp.experts.E.gate_proj.lora_A.weight`, A [R, in] and B [out, R]): PEFT loads that layout onto
transformers' OLMoE, and vLLM and SGLang serve it. Reading also accepts PEFT's layout for fused
experts (`olmoe_jax.checkpoints.peft_fused`).

R is the rank; the other letters are those of `olmoe_jax.checkpoints.names`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_jax.checkpoints import directory, names, peft_fused, safetensors_file
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.peft_fused import LoadedTensor
from olmoe_jax.checkpoints.safetensors_file import StoredTensor
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json
from olmoe_jax.model.config import TARGETS, LoraSettings, ModelConfig
from olmoe_jax.model.parameters import ROUTER

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROUTER_FILE = "router.safetensors"
"""Beside an adapter whose router trained at full rank: `model.layers.N.mlp.gate.weight`."""
EXPORTED = "adapter"
"""In a LoRA run's directory: the folder with the exported adapter."""

_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "layers_to_transform",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
)
"""Fields of adapter_config.json that, when set, mean other mathematics than W + scale * A B."""

_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A", "b": "lora_B"}
_Tensors = Mapping[str, StoredTensor | LoadedTensor]
_ROUTER = next(weight for weight in names.TABLE if weight.name == ROUTER)


def adapted(settings: LoraSettings) -> list[Weight]:
    """Returns the weights that an adapter with these settings changes."""
    return [
        weight
        for weight in names.TABLE
        if weight.per_layer and weight.name.rsplit(".", 1)[-1] in settings.targets
    ]


def parameter_names(weight: Weight) -> tuple[str, str]:
    """Returns the parameters that hold a weight's A and B: layers.attention.lora.q_a and q_b."""
    module, target = weight.name.rsplit(".", 1)
    return f"{module}.lora.{target}_a", f"{module}.lora.{target}_b"


def to_peft(
    parameters: Mapping[str, np.ndarray], settings: LoraSettings
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields PEFT's names and tensors (views) of the adapter parameters."""
    for weight in adapted(settings):
        for part, name in zip(_PARTS, parameter_names(weight), strict=True):
            for layer, value in enumerate(parameters[name]):
                for expert, matrix in enumerate(value) if weight.per_expert else [(None, value)]:
                    yield _tensor_name(weight, part, layer, expert), matrix.T


def _tensor_name(weight: Weight, part: str, layer: int, expert: int | None) -> str:
    module = weight.tensor_name(layer, expert).removesuffix(".weight")
    return f"{_PREFIX}{module}.{_PARTS[part]}.weight"


def write_adapter(
    output: Path, parameters: Mapping[str, np.ndarray], settings: LoraSettings, base: str
) -> None:
    """Writes an adapter into an existing directory.

    Args:
      output: the directory.
      parameters: the adapters' parameters, in any float dtype; stored as float32. And the router
        [L, D, E] when it trained at full rank; stored in a file of its own.
      settings: the adapters' size and scale.
      base: the hub id or path of the base model, for adapter_config.json.
    """
    tensors = {name: value.astype(np.float32) for name, value in to_peft(parameters, settings)}
    safetensors_file.save(output / WEIGHTS_FILE, tensors)
    if ROUTER in parameters:
        layers = {_ROUTER.tensor_name(i): value.T for i, value in enumerate(parameters[ROUTER])}
        safetensors_file.save(output / ROUTER_FILE, layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        # Always the plain scale alpha / r: not every engine knows rslora, and PEFT 0.21 gets it
        # wrong by sqrt(2) for gate and up, whose rank it doubles when transformers 5 fuses them.
        "lora_alpha": settings.scale * settings.rank if settings.rslora else settings.alpha,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": [f"{target}_proj" for target in settings.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    directory.write_json(output / CONFIG_FILE, config)


def adapter_directory(path_or_hub_id: str) -> Path:
    """Finds the directory with an adapter's files.

    Args:
      path_or_hub_id: a PEFT adapter's directory or hub id, or a LoRA run's directory.

    Raises:
      UserError: it holds no adapter.
    """
    path = directory.resolve(path_or_hub_id)
    if (path / EXPORTED / CONFIG_FILE).exists():
        return path / EXPORTED
    if not (path / CONFIG_FILE).exists():
        raise UserError(
            f"{path_or_hub_id}: holds no {CONFIG_FILE}; write the directory of a PEFT adapter, or "
            "of a LoRA run that has ended"
        )
    return path


def read_adapter(
    path_or_hub_id: str | Path, config: ModelConfig
) -> tuple[LoraSettings, dict[str, np.ndarray]]:
    """Reads an adapter of a model with this architecture.

    Args:
      path_or_hub_id: as for `adapter_directory`.
      config: the base model's architecture.

    Returns:
      The adapter's settings, and its parameters by this project's names, float32, stacked over
      layers and experts. A router that trained beside the adapter is among them, under its own
      name.

    Raises:
      UserError: there is no adapter, it is another model's, or it uses features of PEFT that
        compute something else than W + scale * A B.
    """
    path = adapter_directory(str(path_or_hub_id))
    adapter_config = read_json(dict[str, Any], path / CONFIG_FILE)
    settings = _read_settings(adapter_config, path / CONFIG_FILE)
    file = path / WEIGHTS_FILE
    stored = safetensors_file.read_header(file)
    tensors: _Tensors = stored
    if peft_fused.is_fused(stored):
        settings, tensors = peft_fused.per_expert(stored, settings, adapter_config, config, file)
    # target_modules may be a pattern, and may name modules that OLMoE has not: the tensors tell
    # what is adapted.
    targets = tuple(
        target for target in TARGETS if any(f".{target}_proj.lora_A." in name for name in tensors)
    )
    if not targets:
        raise UserError(f"{file}: no tensor of {', '.join(TARGETS)} projections")
    settings = LoraSettings(settings.rank, settings.alpha, 0.0, targets, settings.rslora)
    parameters = _stack(tensors, settings, config, file)
    if (path / ROUTER_FILE).exists():
        parameters[ROUTER] = _read_router(path / ROUTER_FILE, config)
    return settings, parameters


def _stack(
    tensors: _Tensors,
    settings: LoraSettings,
    config: ModelConfig,
    file: Path,
) -> dict[str, np.ndarray]:
    """Reads A [L, …, in, R] and B [L, …, R, out] of every adapted weight, float32.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape.
    """
    parameters, used = {}, set()
    for weight in adapted(settings):
        *experts, width, out = names.layer_shape(weight, config)
        matrices = {"a": (width, settings.rank), "b": (settings.rank, out)}
        for part, parameter in zip(_PARTS, parameter_names(weight), strict=True):
            stacked = np.empty((config.num_layers, *experts, *matrices[part]), np.float32)
            for layer, *expert in np.ndindex(config.num_layers, *experts):
                name = _tensor_name(weight, part, layer, *(expert or [None]))
                stacked[layer, *expert] = _read(tensors, name, matrices[part][::-1], file).T
                used.add(name)
            parameters[parameter] = stacked
    if unknown := tensors.keys() - used:
        raise UserError(f"{file}: unexpected tensor {min(unknown)}")
    return parameters


def _read_router(file: Path, config: ModelConfig) -> np.ndarray:
    """Reads the router that trained beside an adapter, [L, D, E] float32."""
    tensors, shape = safetensors_file.read_header(file), names.hf_shape(_ROUTER, config)
    layers = [
        _read(tensors, _ROUTER.tensor_name(layer), shape, file).T
        for layer in range(config.num_layers)
    ]
    return np.stack(layers)


def _read(
    tensors: _Tensors,
    name: str,
    shape: tuple[int, ...],
    file: Path,
) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{file}: tensor {name} is missing; is this an adapter of another model?")
    if tensors[name].shape != shape:
        raise UserError(
            f"{file}: tensor {name} has shape {list(tensors[name].shape)}, but this model and "
            f"rank need {list(shape)}"
        )
    return tensors[name].read().astype(np.float32)


def _read_settings(config: dict[str, Any], file: Path) -> LoraSettings:
    """Returns rank and scale from adapter_config.json, and refuses what is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: not a LoRA adapter (peft_type {config.get('peft_type')!r}); write another "
            "directory"
        )
    for field, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise UserError(f"{file}: {field} is {value!r}; it must be a positive number")
    unreadable = peft_fused.unreadable(config)
    for field in (*_UNSUPPORTED, *([unreadable] if unreadable else [])):
        if config.get(field):
            raise UserError(
                f"{file}: {field} is set, but only plain LoRA is read; merge this adapter into its "
                "base with PEFT (merge_and_unload), or train one without it"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{file}: bias is {config['bias']!r}; only adapters with bias none are read"
        )
    return LoraSettings(
        config["r"], config["lora_alpha"], rslora=bool(config.get("use_rslora", False))
    )
