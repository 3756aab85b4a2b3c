"""PEFT's LoRA adapters: directories read into this project's parameters, and written.

An adapter is written with tensors for each expert
(`…mlp.experts.E.gate_proj.lora_A.weight`, A [R, in] and B [out, R]): PEFT loads that layout onto
transformers' OLMoE, and vLLM and SGLang serve it. Reading also accepts PEFT's layout for fused
experts (`olmoe_jax.checkpoints.peft_fused`), adapters of some matrices alone, of the router, and
matrices with a rank and a scale of their own.

This project's adapters have one rank R and one scale. R is the largest rank: smaller ones are
filled up with zeros, and a matrix without an adapter gets zeros alone. A scale of a matrix's own
goes into its B, so that W + scale * A B stays. Zeros stay zeros in training: their gradient is 0.

R is the rank; the other letters are those of `olmoe_jax.checkpoints.names`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from olmoe_jax.checkpoints import checksums, directory, names, peft_fused, safetensors_file
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.peft_config import AdapterConfig
from olmoe_jax.checkpoints.peft_fused import LoadedTensor
from olmoe_jax.checkpoints.safetensors_file import StoredTensor
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import TARGETS, LoraSettings, ModelConfig
from olmoe_jax.model.parameters import ROUTER

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROUTER_FILE = "router.safetensors"
"""Beside an adapter whose router trained at full rank: `model.layers.N.mlp.gate.weight`."""
_GATE_FILE = "gate.safetensors"
"""The PyTorch reference calls the router's file gate.pth."""
EXPORTED = "adapter"
"""In a LoRA run's directory: the folder with the exported adapter."""

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)[.]"
)
"""Parts that torch.compile, DDP and FSDP put into the names of a state_dict."""
_TENSOR = re.compile(
    r"((base_)?model[.])*(?P<module>.+)[.]lora_(?P<part>[AB])([.]default)?[.]weight"
)
ROUTER_WEIGHT = next(weight for weight in names.TABLE if weight.name == ROUTER)


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
        for part, parameter in zip("AB", parameter_names(weight), strict=True):
            for layer, value in enumerate(parameters[parameter]):
                for name, matrix in names.to_hf(weight, layer, value):
                    yield f"{_PREFIX}{name.removesuffix('weight')}lora_{part}.weight", matrix


def write_adapter(
    output: Path, parameters: Mapping[str, np.ndarray], settings: LoraSettings, base: str
) -> None:
    """Writes an adapter into an existing directory.

    Args:
      output: the directory.
      parameters: the adapters' parameters in any float dtype, stored as float32; and the router
        [L, D, E] if it trained at full rank, stored in a file of its own.
      settings: the adapters' size and scale.
      base: the hub id or path of the base model, for adapter_config.json.
    """
    tensors = {name: value.astype(np.float32) for name, value in to_peft(parameters, settings)}
    safetensors_file.save(output / WEIGHTS_FILE, tensors)
    if ROUTER in parameters:
        layers = {
            ROUTER_WEIGHT.tensor_name(i): value.T for i, value in enumerate(parameters[ROUTER])
        }
        safetensors_file.save(output / ROUTER_FILE, layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        # Always the plain scale alpha / r: not every engine knows rslora, and PEFT 0.21 gets it
        # wrong by sqrt(2) for gate and up, whose rank it doubles when transformers 5 fuses them.
        "lora_alpha": settings.alpha,
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
      name. Where the router has an adapter, the settings' targets include "router", which no model
      knows: see `merging.with_router`.

    Raises:
      UserError: there is no adapter, it is another model's, or it uses features of PEFT that
        compute something else than W + scale * A B.
    """
    path = adapter_directory(str(path_or_hub_id))
    checksums.check_weights(path)
    adapter = AdapterConfig(path / CONFIG_FILE)
    if not (path / WEIGHTS_FILE).exists():
        safetensors_file.refuse_pickles(path, "adapter_model*.bin", WEIGHTS_FILE)
    factors = _read_factors(path / WEIGHTS_FILE, adapter, config)
    found = {matrix.weight.name.rsplit(".", 1)[-1] for matrix in factors}
    targets = tuple(target for target in (*TARGETS, "router") if target in found)
    rank, fields = max(a.shape[0] for a, _, _ in factors.values()), adapter.fields
    alpha = fields.lora_alpha * (math.sqrt(fields.r) if fields.use_rslora else 1)
    if rank != fields.r:
        alpha *= rank / fields.r
    settings = LoraSettings(rank, alpha, 0.0, targets)
    parameters = _stack(factors, settings, config)
    if router := router_file(path):
        if "router" in targets:
            raise UserError(f"{path}: adapts the router, which {router.name} replaces; remove it")
        parameters[ROUTER] = _read_router(router, config)
    return settings, parameters


def router_file(path: Path) -> Path | None:
    """Returns the file of the router that trained beside the adapter in a directory, if any.

    Raises:
      UserError: there are two, or the router is a pickle, which the message converts.
    """
    found = [path / name for name in (ROUTER_FILE, _GATE_FILE) if (path / name).exists()]
    if len(found) > 1:
        raise UserError(f"{path}: {ROUTER_FILE} and {_GATE_FILE} are both a router; remove one")
    if not found:
        safetensors_file.refuse_pickles(path, "gate.p*", ROUTER_FILE)
    return found[0] if found else None


class _Matrix(NamedTuple):
    """A matrix that can have an adapter."""

    weight: Weight
    layer: int
    expert: int | None

    @property
    def module(self) -> str:
        """The module of transformers: `model.layers.0.mlp.experts.3.gate_proj`."""
        return self.weight.tensor_name(self.layer, self.expert).removesuffix(".weight")

    @property
    def parameter(self) -> str:
        """The parameter of transformers 5: `model.layers.0.mlp.experts.gate_up_proj`."""
        return (self.weight.fused_name or self.weight.hf_name).format(layer=self.layer)


_Tensor = StoredTensor | LoadedTensor
_Factors = dict[_Matrix, tuple[_Tensor, _Tensor, float]]
"""A [r, in], B [out, r] and the scale of each adapted matrix."""


def _matrices(config: ModelConfig) -> dict[str, _Matrix]:
    """Returns the matrices that can have an adapter, by module."""
    matrices = (
        _Matrix(weight, layer, expert)
        for weight in names.TABLE
        if weight.per_layer and weight.transpose
        for layer in range(config.num_layers)
        for expert in (range(config.num_experts) if weight.per_expert else [None])
    )
    return {matrix.module: matrix for matrix in matrices}


def _read_factors(file: Path, adapter: AdapterConfig, config: ModelConfig) -> _Factors:
    """Returns the factors in an adapter's file.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape than the model and
        adapter_config.json say.
    """
    matrices, factors = _matrices(config), {}
    for module, (a, b) in _read_pairs(file).items():
        is_fused = module.endswith((".mlp.experts", ".mlp.experts.base_layer"))
        # The matrices that the two tensors adapt, by expert.
        modules = peft_fused.modules(module, a, b, config) if is_fused else [[module]]
        matrix = matrices.get(modules[0][0])
        if matrix is None:
            raise UserError(
                f"{file}: adapts {module}, but adapters are read of the projections and the router "
                f"(mlp.gate) of {config.num_layers} layers and {config.num_experts} experts; is it "
                "of another model? Else merge it into its base with PEFT (merge_and_unload)"
            )
        rank, scale = adapter.size(matrix.module, matrix.parameter)
        width, out = names.layer_shape(matrix.weight, config)[-2:]
        ranks = rank * len(modules)
        expected = (ranks, width), (out * len(modules[0]), ranks)
        if (a.shape, b.shape) != expected:
            raise UserError(
                f"{file}: {module}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}, "
                f"but this model and rank {rank} need {list(expected[0])} and {list(expected[1])}"
            )
        for name, *pair in peft_fused.split(a, b, modules) if is_fused else [(module, a, b)]:
            factors[matrices[name]] = *pair, scale
    if not factors:
        raise UserError(f"{file}: holds no tensor; train the adapter again, or copy it again")
    for module, matrix in matrices.items():
        named = adapter.adapts(module, matrix.parameter)
        if named and matrix not in factors:
            raise UserError(
                f"{file}: {module}.lora_A.weight is missing, but {CONFIG_FILE} names this matrix; "
                "copy the adapter again. Is it of another model?"
            )
        if matrix in factors and not named:
            raise UserError(
                f"{file}: adapts {module}, but {CONFIG_FILE} does not name this matrix "
                "(target_modules, exclude_modules, layers_to_transform); write there what is in "
                "the file"
            )
    return factors


def _read_pairs(file: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Returns A and B of each module, by its name without the prefixes that trainers put there."""
    parts: dict[str, dict[str, StoredTensor]] = {"A": {}, "B": {}}
    for name, tensor in safetensors_file.read_header(file).items():
        match = _TENSOR.fullmatch(_WRAPPERS.sub("", name))
        if not match:
            raise UserError(
                f"{file}: unexpected tensor {name}: only lora_A and lora_B are read; merge this "
                "adapter into its base with PEFT (merge_and_unload)"
            )
        module = match["module"]
        module = f"model.{module}" if module.startswith("layers.") else module
        if module in parts[match["part"]]:
            raise UserError(f"{file}: has two tensors lora_{match['part']} of {module}; remove one")
        parts[match["part"]][module] = tensor
    for part, other in ("A", "B"), ("B", "A"):
        for module in parts[other].keys() - parts[part].keys():
            raise UserError(f"{file}: {module}.lora_{part}.weight is missing; copy it again")
    return {module: (a, parts["B"][module]) for module, a in parts["A"].items()}


def _stack(factors: _Factors, settings: LoraSettings, config: ModelConfig) -> dict[str, np.ndarray]:
    """Reads A [L, …, in, R] and B [L, …, R, out] of every adapted weight, float32."""
    parameters = {}
    for weight in adapted(settings):
        *experts, width, out = names.layer_shape(weight, config)
        outer, (a, b) = (config.num_layers, *experts), parameter_names(weight)
        parameters[a] = np.zeros((*outer, width, settings.rank), np.float32)
        parameters[b] = np.zeros((*outer, settings.rank, out), np.float32)
    for (weight, layer, expert), (a, b, scale) in factors.items():
        place = (layer,) if expert is None else (layer, expert)
        into_a, into_b = (parameters[name][place] for name in parameter_names(weight))
        into_a[:, : a.shape[0]] = a.read().T
        into_b[: a.shape[0]] = b.read().T
        if not math.isclose(scale, settings.scale):
            into_b *= np.float32(scale / settings.scale)
    return parameters


def _read_router(file: Path, config: ModelConfig) -> np.ndarray:
    """Reads the router that trained beside an adapter, [L, D, E] float32."""
    tensors, shape = safetensors_file.read_header(file), names.hf_shape(ROUTER_WEIGHT, config)
    layers = [ROUTER_WEIGHT.tensor_name(layer) for layer in range(config.num_layers)]
    for name in layers:
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != list(shape):
            raise UserError(f"{file}: tensor {name} is {found}, but this model needs {list(shape)}")
    return np.stack([tensors[name].read().astype(np.float32).T for name in layers])
