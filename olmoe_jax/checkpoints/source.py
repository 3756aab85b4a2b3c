"""Where weights come from: a Hugging Face checkpoint or one of ours, read through one interface."""

from pathlib import Path
from typing import Protocol

import numpy as np

from olmoe_jax.checkpoints import directory, names
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelConfig, model_config_from_hf

MODEL_DIRECTORY = "model"
"""In every directory of ours: config.json, the generation config and the tokenizer."""
PARAMETERS = "parameters"


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
        return checked(self._items[item][row.ours], names.layer_shape(row, self.config), row.ours)


def checked(array, shape: tuple[int, ...], name: str):
    """The lazy array, whose shape must be the one that config.json implies.

    Raises:
      UserError: it is another.
    """
    if tuple(array.shape) != shape:
        raise UserError(
            f"{name} has shape {list(array.shape)}, but config.json says {list(shape)}; this "
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
