"""PEFT adapter directories: read into our parameters, written for other people's software.

The per-expert layout (`…mlp.experts.E.gate_proj.lora_A.weight`) is what PEFT loads onto
transformers' OLMoE and what vLLM and SGLang serve. Tensors are [R, in] and [out, R], as in torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_jax.checkpoints import directory, names, peft_fused, safetensors_file
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.lora import TARGETS, LoraSettings
from olmoe_jax.model.parameters import ROUTER

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXPORTED = "adapter"
"""Where a LoRA run exports its adapter."""
ROUTER_FILE = "router.safetensors"
"""Beside the adapter, when the router trained at full rank: `model.layers.N.mlp.gate.weight`."""

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
_ROUTER_ROW = next(row for row in names.TABLE if row.ours == ROUTER)


def target_of(row: names.Row) -> str | None:
    """The LoRA target that adapts this weight, or None."""
    last = row.ours.rsplit(".", 1)[-1]
    return last if last in TARGETS and row.per_layer else None


def parameter_name(row: names.Row, part: str) -> str:
    """Our name of an adapter's part ("a" or "b"): layers.attention.lora.q_a, …"""
    module, last = row.ours.rsplit(".", 1)
    return f"{module}.lora.{last}_{part}"


def rows_of(settings: LoraSettings) -> list[names.Row]:
    """The weights that these settings adapt."""
    return [row for row in names.TABLE if target_of(row) in settings.targets]


def to_peft(
    parameters: dict[str, np.ndarray], settings: LoraSettings
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and tensors (views) of our adapter parameters."""
    for row in rows_of(settings):
        for part in _PARTS:
            stacked = parameters[parameter_name(row, part)]
            for layer, value in enumerate(stacked):
                for expert, matrix in enumerate(value) if row.per_expert else [(None, value)]:
                    yield _tensor_name(row, part, layer, expert), matrix.T


def _tensor_name(row: names.Row, part: str, layer: int, expert: int | None) -> str:
    name = row.theirs.format(layer=layer, expert=expert).removesuffix(".weight")
    return f"{_PREFIX}{name}.{_PARTS[part]}.weight"


def write_adapter(
    output: Path,
    parameters: dict[str, np.ndarray],
    settings: LoraSettings,
    base: str,
) -> None:
    """Writes an adapter into an existing directory.

    Args:
      parameters: the adapters, any float dtype, stored as float32; and the router [L, D, E] when
        it trained at full rank, stored in a file of its own.
      settings: the adapters' size and scale.
      base: the hub id or path of the base model, for adapter_config.json.
    """
    tensors = {name: value.astype(np.float32) for name, value in to_peft(parameters, settings)}
    safetensors_file.save(output / WEIGHTS, tensors)
    if ROUTER in parameters:
        stacked = parameters[ROUTER]
        layers = {_ROUTER_ROW.theirs.format(layer=i): w.T for i, w in enumerate(stacked)}
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
    directory.write_json(output / CONFIG, config)


def adapter_directory(path_or_hub_id: str) -> Path:
    """Where the files of an adapter are: a PEFT adapter's directory, or in a LoRA run's.

    Raises:
      UserError: there are none.
    """
    path = directory.resolve(path_or_hub_id)
    if (path / EXPORTED / CONFIG).exists():
        return path / EXPORTED
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path_or_hub_id}: holds no {CONFIG}; write a PEFT adapter's directory, or a LoRA "
            "run's that has ended"
        )
    return path


def read_adapter(
    path_or_hub_id: str | Path, config: ModelConfig
) -> tuple[LoraSettings, dict[str, np.ndarray]]:
    """Reads an adapter of a model with this architecture.

    Args:
      path_or_hub_id: a PEFT adapter's directory or hub id, or the LoRA run that exported one.
      config: the base model's architecture.

    Returns:
      The adapter's settings, and its parameters by our names, float32, stacked over layers and
      experts. A router that trained beside the adapter is among them, under its own name.

    Raises:
      UserError: there is no adapter, it is another model's, or it uses features of PEFT that
        compute something else than W + scale * A B.
    """
    path = adapter_directory(str(path_or_hub_id))
    file = path / CONFIG
    adapter_config = directory.read_json(file)
    settings = _read_settings(adapter_config, file)
    tensors = safetensors_file.read_header(path / WEIGHTS)
    if peft_fused.is_fused(tensors):
        settings, tensors = peft_fused.per_expert(
            tensors, settings, adapter_config, config, path / WEIGHTS
        )
    targets = tuple(
        target
        for target in settings.targets
        if any(f".{target}_proj.lora_A." in name for name in tensors)
    )
    if not targets:
        raise UserError(f"{path / WEIGHTS}: no tensor of {', '.join(TARGETS)} projections")
    settings = LoraSettings(settings.rank, settings.alpha, 0.0, targets, settings.rslora)
    shapes = {
        (row, part): _shape(row, part, config, settings)
        for row in rows_of(settings)
        for part in _PARTS
    }
    parameters, used = {}, set()
    for (row, part), shape in shapes.items():
        stacked = np.empty(shape, np.float32)
        for index in np.ndindex(shape[:-2]):
            name = _tensor_name(row, part, index[0], index[1] if row.per_expert else None)
            stacked[index] = _read(tensors, name, shape[:-3:-1], path).T
            used.add(name)
        parameters[parameter_name(row, part)] = stacked
    if unknown := tensors.keys() - used:
        raise UserError(f"{path / WEIGHTS}: unexpected tensor {min(unknown)}")
    if (path / ROUTER_FILE).exists():
        parameters[ROUTER] = _read_router(path / ROUTER_FILE, config)
    return settings, parameters


def _read_router(file: Path, config: ModelConfig) -> np.ndarray:
    """Returns the router that trained beside an adapter, [L, D, E] float32."""
    tensors, shape = safetensors_file.read_header(file), names.hf_shape(_ROUTER_ROW, config)
    layers = (
        _read(tensors, _ROUTER_ROW.theirs.format(layer=layer), shape, file).T
        for layer in range(config.num_layers)
    )
    return np.stack(list(layers))


def _read(tensors, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path}: tensor {name} is missing; is this an adapter of another model?")
    if tensors[name].shape != shape:
        raise UserError(
            f"{path}: tensor {name} has shape {list(tensors[name].shape)}, but this model and "
            f"rank need {list(shape)}"
        )
    return tensors[name].read().astype(np.float32)


def _shape(row: names.Row, part: str, config: ModelConfig, settings: LoraSettings):
    *outer, width, out = names.layer_shape(row, config)
    matrix = (width, settings.rank) if part == "a" else (settings.rank, out)
    return (config.num_layers, *outer, *matrix)


def _read_settings(config: dict[str, Any], file: Path) -> LoraSettings:
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


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, settings: LoraSettings) -> np.ndarray:
    """W + scale * A B in float32, of one matrix or of a stack of experts' matrices."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return weight.astype(np.float32) + np.float32(settings.scale) * (a @ b)


class MergedSource:
    """A base with an adapter merged into it, layer by layer: W + scale * A B in float32.

    Args:
      base: the weights that the adapter was trained on.
      path: the adapter's directory; its router.safetensors, where there is one, replaces the
        base's router.
      dtype: the base is rounded to it first, as when PEFT merges into a base loaded in it; None:
        the base as it is stored.
    """

    def __init__(self, base: Source, path: Path, dtype: np.dtype | None = None):
        self.config, self.files, self._base, self._dtype = base.config, base.files, base, dtype
        self._settings, self._adapter = read_adapter(path, base.config)
        self._adapted = {row.ours for row in rows_of(self._settings)}

    def dtype(self, row: names.Row) -> np.dtype:
        return self._base.dtype(row)

    def export_dtype(self) -> str | None:
        return self._base.export_dtype()

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if row.ours in self._adapter:  # the router, trained at full rank
            return self._adapter[row.ours][layer]
        weight = self._base.read(row, layer, *([experts] if row.per_expert else []))
        if row.ours not in self._adapted:
            return weight
        a, b = (self._adapter[parameter_name(row, part)][layer] for part in _PARTS)
        if row.per_expert:
            a, b = a[experts], b[experts]
        if self._dtype is not None:
            weight = weight.astype(self._dtype)
        return merged(weight, a, b, self._settings)
