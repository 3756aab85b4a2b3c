"""Where weights come from: a Hugging Face checkpoint or one of ours, read through one interface."""

import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from olmoe_jax.errors import UserError
from olmoe_jax.hf import directory, names
from olmoe_jax.hf.checkpoint import HFCheckpoint
from olmoe_jax.model.config import ModelConfig, model_config_from_hf

MODEL_DIRECTORY = "model"
"""In every directory of ours: config.json, the generation config and the tokenizer."""
PARAMETERS = "parameters"
CHECKPOINTS = "checkpoints"


class Source(Protocol):
    """Weights of an OLMoE model on disk."""

    config: ModelConfig

    @property
    def files(self) -> Path:
        """The directory with config.json, the generation config and the tokenizer."""

    def dtype(self, row: names.Row) -> np.dtype:
        """The dtype in which a weight is stored."""

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        """One layer's weight in our layout (or, of its experts, a slice), in the stored dtype."""

    def export_dtype(self) -> str | None:
        """The dtype to export in when the user names none; None: each weight's own."""


class OrbaxArrays:
    """Named arrays of an Orbax checkpoint, read slice by slice without restoring the rest.

    Orbax keeps each array as a zarr array in one OCDBT store, under its dotted path.
    """

    def __init__(self, path: Path):
        self._base, self._open = path, {}

    def __getitem__(self, name: str):
        """The array as a lazy tensorstore: index it, then read."""
        import tensorstore

        if name not in self._open:
            base = f"file://{self._base.absolute()}/"
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            try:
                self._open[name] = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self._base}: cannot read {name} ({reason}); the checkpoint is damaged or "
                    "another model's"
                ) from None
        return self._open[name]


class ConvertedCheckpoint:
    """What `convert.from_hf` writes: one Orbax item for each layer and one for the rest."""

    def __init__(self, path: Path):
        self._path, self.files = path, path / MODEL_DIRECTORY
        self.config = read_model_config(self.files)
        self._items: dict[str, OrbaxArrays] = {}

    def dtype(self, row: names.Row) -> np.dtype:
        return self._array(row, 0 if row.per_layer else None).dtype.numpy_dtype

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        array = self._array(row, layer)
        return (array[experts] if row.per_expert else array).read().result()

    def export_dtype(self) -> str | None:
        return None

    def _array(self, row: names.Row, layer: int | None):
        item = item_name(layer)
        if item not in self._items:
            self._items[item] = OrbaxArrays(self._path / PARAMETERS / item)
        return _checked(self._items[item][row.ours], names.layer_shape(row, self.config), row)


class RunCheckpoint:
    """The weights of a training run's checkpoint: what it trained, the rest from its base."""

    def __init__(self, path: Path, step: int | None = None):
        self._path, self.files = path, path / MODEL_DIRECTORY
        self.config = read_model_config(self.files)
        self.step = latest_step(path) if step is None else step
        item = path / CHECKPOINTS / str(self.step) / "state"
        if not item.is_dir():
            raise UserError(f"{path}: no checkpoint of step {self.step}; there are {steps(path)}")
        saved = directory.read_json(item / "_METADATA")["tree_metadata"].values()
        keys = [tuple(entry["key"] for entry in leaf["key_metadata"]) for leaf in saved]
        self._group = {key[-1]: key[0] for key in keys if key[0] in ("parameters", "frozen")}
        self._arrays = OrbaxArrays(item)

    @functools.cached_property
    def _base(self) -> Source:
        return open_source(directory.read_json(self._path / "config.json")["model"]["path"])

    def dtype(self, row: names.Row) -> np.dtype:
        if row.ours not in self._group:
            return self._base.dtype(row)
        return self._array(row).dtype.numpy_dtype

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if row.ours not in self._group:
            return self._base.read(row, layer, *([experts] if row.per_expert else []))
        array = self._array(row)
        if layer is not None:
            array = array[layer]
        return (array[experts] if row.per_expert else array).read().result()

    def export_dtype(self) -> str | None:
        config = directory.read_json(self.files / "config.json")
        return config.get("dtype") or config.get("torch_dtype") or "float32"

    def _array(self, row: names.Row):
        shape = names.layer_shape(row, self.config)
        shape = (self.config.num_layers, *shape) if row.per_layer else shape
        return _checked(self._arrays[f"{self._group[row.ours]}.{row.ours}"], shape, row)


def _checked(array, shape: tuple[int, ...], row: names.Row):
    if tuple(array.shape) != shape:
        raise UserError(
            f"{row.ours} has shape {list(array.shape)}, but config.json says {list(shape)}; this "
            "is a checkpoint of a different model"
        )
    return array


def item_name(layer: int | None) -> str:
    """The Orbax item of a converted checkpoint that holds a layer (None: the rest)."""
    return "rest" if layer is None else f"layer_{layer:05}"


def read_model_config(files: Path) -> ModelConfig:
    """The architecture from a directory's config.json."""
    file = files / "config.json"
    return model_config_from_hf(directory.read_json(file), str(file))


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
