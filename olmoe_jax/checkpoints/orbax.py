"""Orbax: reading arrays without restoring, and the checkpoints that `convert.from_hf` writes.

A converted checkpoint's directory holds MODEL_DIRECTORY with the small files, and PARAMETERS with
one Orbax checkpoint for each layer and one for the weights outside the layers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.safetensors_file import check_finite
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY, Source, read_model_config
from olmoe_jax.errors import UserError
from olmoe_jax.parallel.cpu import return_freed_memory

if TYPE_CHECKING:
    from tensorstore import TensorStore

PARAMETERS = "parameters"


class OrbaxArrays:
    """The named arrays of an Orbax checkpoint. Slices are read without restoring the rest.

    Orbax keeps each array as a zarr array in one OCDBT store, under its dotted path.
    """

    def __init__(self, path: Path):
        self._path = path
        self._open: dict[str, TensorStore] = {}

    def open(self, name: str, shape: tuple[int, ...]) -> "TensorStore":
        """Opens an array. Index the result for a slice, then call `.read().result()`.

        Raises:
          UserError: the array is missing or damaged, or its shape is not the one that
            config.json implies.
        """
        if name not in self._open:
            import tensorstore

            base = f"file://{self._path.absolute()}/"
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            try:
                opened = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self._path}: cannot read {name} ({reason}); the checkpoint is damaged or "
                    "another model's"
                ) from None
            self._open[name] = opened
        array = self._open[name]
        if tuple(array.shape) != shape:
            raise UserError(
                f"{self._path}: {name} has shape {list(array.shape)}, but config.json says "
                f"{list(shape)}; this is a checkpoint of a different model"
            )
        return array


class ConvertedCheckpoint(Source):
    """The weights of a checkpoint that `convert.from_hf` wrote."""

    def __init__(self, path: Path):
        self.files = path / MODEL_DIRECTORY
        self.config = read_model_config(self.files)
        layers = [None, *range(self.config.num_layers)]
        self._items = {layer: OrbaxArrays(_item(path, layer)) for layer in layers}

    def dtype(self, weight: Weight) -> np.dtype:
        return self._array(weight, names.layer_indices(weight, self.config)[0]).dtype.numpy_dtype

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        array = self._array(weight, layer)
        return (array[experts] if weight.per_expert else array).read().result()

    def _array(self, weight: Weight, layer: int | None) -> "TensorStore":
        return self._items[layer].open(weight.name, names.layer_shape(weight, self.config))


def write_weights(source: Source, output: Path, allow_nonfinite: bool) -> None:
    """Writes a source's weights into a converted checkpoint's directory.

    The weights keep their stored dtype, bit for bit. Two layers are in memory at a time.

    Raises:
      UserError: a weight is not finite, and `allow_nonfinite` is False.
    """
    import jax
    import orbax.checkpoint as ocp

    weights = names.weights(source.config)

    def read(layer: int | None) -> dict[str, np.ndarray]:
        values = {}
        for weight in weights:
            if weight.per_layer == (layer is not None):
                values[weight.name] = value = source.read(weight, layer)
                for tensor in [] if allow_nonfinite else names.to_hf(weight, layer, value):
                    check_finite(*tensor)
        return values

    # Orbax would copy each array, in case it changes during the save, and compress it, which takes
    # longer than to write it.
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, types.ArrayHandler()),  # absent, Orbax prints a warning
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.AsyncCheckpointer(handler) as checkpointer:
        for layer in [None, *range(source.config.num_layers)]:
            # A layer is read while the one before is written; no variable keeps either alive.
            path, values = _item(output, layer).absolute(), read(layer)
            checkpointer.save(path, args=ocp.args.PyTreeSave(values))
            del values
            # glibc would keep the buffers of every save, and reuse only about half of them.
            return_freed_memory()


def _item(path: Path, layer: int | None) -> Path:
    """Returns the Orbax checkpoint of a layer, or of the weights outside the layers (None)."""
    return path / PARAMETERS / ("rest" if layer is None else f"layer_{layer:05}")
