"""Where weights come from: a Hugging Face checkpoint or one of ours, read through one interface."""

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


class OrbaxArrays:
    """Named arrays of an Orbax checkpoint, read slice by slice without restoring the rest.

    Orbax keeps each array as a zarr array in one OCDBT store, under its dotted path.
    """

    def __init__(self, path: Path, prefix: str = ""):
        self._base, self._prefix, self._open = path, prefix, {}

    def __getitem__(self, name: str):
        """The array as a lazy tensorstore: index it, then read."""
        import tensorstore

        if name not in self._open:
            key = f"{self._prefix}{name}/"
            store = {"driver": "ocdbt", "base": f"file://{self._base.absolute()}/", "path": key}
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

    def _array(self, row: names.Row, layer: int | None):
        item = item_name(layer)
        if item not in self._items:
            self._items[item] = OrbaxArrays(self._path / PARAMETERS / item)
        return _checked(self._items[item][row.ours], names.layer_shape(row, self.config), row)


class RunCheckpoint:
    """The parameters of a training run's checkpoint (stacked over layers)."""

    def __init__(self, path: Path, step: int | None = None):
        self.files = path / MODEL_DIRECTORY
        self.config = read_model_config(self.files)
        self.step = latest_step(path) if step is None else step
        item = path / CHECKPOINTS / str(self.step) / "state"
        if not item.is_dir():
            raise UserError(f"{path}: no checkpoint of step {self.step}; steps: {steps(path)}")
        self._arrays = OrbaxArrays(item, "parameters.")

    def dtype(self, row: names.Row) -> np.dtype:
        return self._array(row).dtype.numpy_dtype

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        array = self._array(row)
        if layer is not None:
            array = array[layer]
        return (array[experts] if row.per_expert else array).read().result()

    def _array(self, row: names.Row):
        shape = names.layer_shape(row, self.config)
        shape = (self.config.num_layers, *shape) if row.per_layer else shape
        return _checked(self._arrays[row.ours], shape, row)


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
