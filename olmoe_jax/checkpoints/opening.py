"""Opening checkpoints of any kind, those of training runs included."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_jax.checkpoints import directory, names, peft
from olmoe_jax.checkpoints.expert_config import read_expert_config
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.source import (
    MODEL_DIRECTORY,
    PARAMETERS,
    ConvertedCheckpoint,
    OrbaxArrays,
    Source,
    checked,
    read_model_config,
)
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.tuned import places

CHECKPOINTS = "checkpoints"
EXPERTS = "experts.json"
"""In an ESFT run's directory: what it trains."""


class RunCheckpoint:
    """The weights of a training run's checkpoint: what it trained, the rest from its base."""

    def __init__(self, path: Path, step: int | None = None):
        self.path, self.files = path, path / MODEL_DIRECTORY
        self.config = read_model_config(self.files)
        self.step = latest_step(path) if step is None else step
        item = path / CHECKPOINTS / str(self.step) / "state"
        if not item.is_dir():
            raise UserError(f"{path}: no checkpoint of step {self.step}; there are {steps(path)}")
        saved = directory.read_json(item / "_METADATA")["tree_metadata"].values()
        keys = [tuple(entry["key"] for entry in leaf["key_metadata"]) for leaf in saved]
        self.lora = LoraSettings.of_method(self._run_config["method"])
        file = path / EXPERTS
        self.experts = read_expert_config(file, self.config) if file.exists() else None
        chosen = self.experts and self.experts.experts
        settings = ModelSettings(lora=self.lora, tuned_experts=chosen)
        self._specs = parameter_specs(self.config, settings)
        self._group = {key[-1]: key[0] for key in keys if key[0] in ("parameters", "frozen")}
        self._arrays = OrbaxArrays(item)

    @functools.cached_property
    def _run_config(self) -> dict[str, Any]:
        return directory.read_json(self.path / "config.json")

    @property
    def base(self) -> str:
        """Hub id or directory of the model that the run started from."""
        return self._run_config["model"]["path"]

    @functools.cached_property
    def _base(self) -> Source:
        return open_source(self.base)

    def dtype(self, row: names.Row) -> np.dtype:
        if row.ours not in self._group:
            return self._base.dtype(row)
        return self._array(row.ours).dtype.numpy_dtype

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        weight = self._base_weight(row, layer, experts)
        if self.experts and row.per_expert:
            return self._with_tuned(weight, row, layer, experts)
        if not self.lora or peft.target_of(row) not in self.lora.targets:
            return weight
        a, b = (self._array(peft.parameter_name(row, part))[layer] for part in "ab")
        if row.per_expert:
            a, b = a[experts], b[experts]
        return peft.merged(weight, a.read().result(), b.read().result(), self.lora)

    def _with_tuned(self, weight, row: names.Row, layer: int, experts: slice) -> np.ndarray:
        wanted = range(*experts.indices(self.config.num_experts))
        pack = self._array(names.tuned_name(row))
        for place, (at_layer, expert) in enumerate(places(self.experts.experts)):
            if at_layer == layer and expert in wanted:
                # float32 holds both; what is exported is rounded once.
                weight = weight.astype(np.float32)
                weight[wanted.index(expert)] = pack[place].read().result()
        return weight

    def _base_weight(self, row: names.Row, layer: int | None, experts: slice) -> np.ndarray:
        if row.ours not in self._group:
            return self._base.read(row, layer, *([experts] if row.per_expert else []))
        array = self._array(row.ours)
        if layer is not None:
            array = array[layer]
        return (array[experts] if row.per_expert else array).read().result()

    def trained(self) -> dict[str, np.ndarray]:
        """Everything that the run trained, by parameter name: for adapters, which are small."""
        names_ = [name for name, group in self._group.items() if group == "parameters"]
        return {name: self._array(name).read().result() for name in names_}

    def export_dtype(self) -> str | None:
        config = directory.read_json(self.files / "config.json")
        return config.get("dtype") or config.get("torch_dtype") or "float32"

    def _array(self, name: str):
        return checked(self._arrays[f"{self._group[name]}.{name}"], self._specs[name].shape, name)


def steps(run: Path) -> list[int]:
    """The steps of a run's committed checkpoints, ascending."""
    found = (run / CHECKPOINTS).glob("*/state") if (run / CHECKPOINTS).is_dir() else []
    return sorted(int(item.parent.name) for item in found if item.parent.name.isdigit())


def latest_step(run: Path) -> int:
    """The newest checkpoint's step.

    Raises:
      UserError: the run has none yet.
    """
    found = steps(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint yet; wait for the first or train longer")
    return found[-1]


def open_source(path_or_hub_id: str, step: int | None = None) -> Source:
    """Opens a checkpoint of any kind, told apart by what the directory holds.

    Raises:
      UserError: it is missing, incomplete, or of another architecture.
    """
    path = directory.resolve(path_or_hub_id)
    if (path / PARAMETERS).is_dir():
        return ConvertedCheckpoint(path)
    if (path / CHECKPOINTS).is_dir():
        return RunCheckpoint(path, step)
    return HFCheckpoint(path)
