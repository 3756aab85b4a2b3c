"""PEFT's adapter_config.json: which matrices an adapter changes, its ranks and its scales.

Only W + scale * A B is read. Every other field is refused unless it is null, false or empty, known
or not: a field of a later PEFT may mean other mathematics.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic_core import SchemaError, SchemaValidator, core_schema, to_json

from olmoe_jax.errors import UserError, shorten
from olmoe_jax.files import STRICT, read_json, validate

HISTORY = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
}
"""Fields that say how an adapter was trained, not what it computes."""
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is. The others take a part of W out."""
_MERGE = "merge this adapter into its base with PEFT (merge_and_unload), or train one without it"

_Rank = Annotated[int, pydantic.Field(gt=0, le=1 << 16)]
_Alpha = Annotated[float, pydantic.Field(gt=0, le=1e12)]
_Names = list[str] | str | None


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields that say what a LoRA adapter computes."""

    peft_type: str
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names = None


class AdapterConfig:
    """The content of an adapter_config.json.

    Names of matrices are those of transformers: a module (`model.layers.0.self_attn.q_proj`), and
    the parameter in which transformers 5 keeps it (`model.layers.0.mlp.experts.gate_up_proj`).

    Raises:
      UserError: the file is missing or damaged, it is not a LoRA adapter's, or a field is set that
        means something else than W + scale * A B, or that this version does not know. The methods
        raise one where a field is a regular expression that cannot be read.
    """

    def __init__(self, file: Path):
        content = read_json(dict[str, Any], file)
        if content.get("peft_type") != "LORA":
            kind = _show(content.get("peft_type"))
            raise UserError(
                f"{file}: not a LoRA adapter (peft_type {kind}); write another directory"
            )
        self._file, self.fields = file, validate(_Fields, content, file)
        declared = {field.name for field in dataclasses.fields(_Fields)}
        refused = {k: v for k, v in content.items() if v and k not in HISTORY | declared}
        if self.fields.bias != "none":
            refused["bias"] = self.fields.bias
        if self.fields.init_lora_weights not in _INITIAL:
            refused["init_lora_weights"] = self.fields.init_lora_weights
        for field, value in refused.items():
            raise UserError(f"{file}: {field} is {_show(value)}, which is not plain LoRA; {_MERGE}")

    def adapts(self, module: str, parameter: str) -> bool:
        """Returns whether PEFT puts an adapter beside a matrix."""
        targets = self.fields.target_modules
        if _ends(parameter, self.fields.target_parameters):
            return True
        if not targets or self._named(module, "exclude_modules"):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or self._named(module, "target_modules")
        return module in targets or (_ends(module, targets) and self._in_layers(module))

    def size(self, module: str, parameter: str) -> tuple[int, float]:
        """Returns rank and scale of a matrix's adapter."""
        name = parameter if _ends(parameter, self.fields.target_parameters) else module
        rank = self._of_pattern(name, "rank_pattern", self.fields.r)
        alpha = self._of_pattern(name, "alpha_pattern", self.fields.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.fields.use_rslora else rank)

    def _named(self, module: str, field: str) -> bool:
        """Returns whether a field names a module: by a pattern, or by the ends of names."""
        names = getattr(self.fields, field)
        return (
            self._matches(names, module, field) if isinstance(names, str) else _ends(module, names)
        )

    def _in_layers(self, module: str) -> bool:
        layers, patterns = self.fields.layers_to_transform, self.fields.layers_pattern
        if layers is None or layers == []:
            return True
        layer = int(module.split(".")[2])
        if layer not in (layers if isinstance(layers, list) else [layers]):
            return False
        return not patterns or any(
            self._matches(pattern, module, "layers_pattern", r"(.*\.)?", rf"\.{layer}\..*")
            for pattern in (patterns if isinstance(patterns, list) else [patterns])
        )

    def _of_pattern(self, name: str, field: str, default: Any) -> Any:
        """Returns the value of the first pattern that a name ends with."""
        for pattern, value in (getattr(self.fields, field) or {}).items():
            if self._matches(pattern, name, field, r"(.*\.)?"):
                return value
        return default

    def _matches(
        self, pattern: str, name: str, field: str, before: str = "", after: str = ""
    ) -> bool:
        """Returns whether a field's pattern, between `before` and `after`, is the whole name."""
        try:
            return _compiled(f"^{before}(?:{pattern}){after}$").isinstance_python(name)
        except SchemaError:
            raise UserError(
                f"{self._file}: {field}: {shorten(pattern)} is no regular expression, or one with "
                f"look-around or references, which are not read; {_MERGE}"
            ) from None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> SchemaValidator:
    """Compiles a regular expression.

    Pydantic's engine takes linear time, whatever the pattern. Python's may take for ever.
    """
    return SchemaValidator(core_schema.str_schema(pattern=pattern))


def _ends(name: str, suffixes: list[str] | None) -> bool:
    """Returns whether a name is, or ends with, one of the names."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes or [])


def _show(value: Any) -> str:
    return shorten(to_json(value, inf_nan_mode="constants").decode(), 60)
