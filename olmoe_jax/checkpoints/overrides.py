"""ESFT's exports without the base: the trained tensors, to put in the place of a base's.

`trained.safetensors` holds the tensors under Hugging Face's names and in its layout.
`expert_config.json` says which experts they are.
"""

from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints import checksums, names, safetensors_file
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.source import ChangedSource, Source
from olmoe_jax.errors import UserError

WEIGHTS_FILE = "trained.safetensors"
CONFIG_FILE = "expert_config.json"


class OverriddenSource(ChangedSource):
    """The weights of a base in which a directory's trained tensors replace the base's.

    Raises:
      UserError: a tensor is not one of this model's, or has another shape.
    """

    def __init__(self, base: Source, path: Path):
        super().__init__(base)
        checksums.check_weights(path)
        file = path / WEIGHTS_FILE
        self._tensors = safetensors_file.read_header(file)
        shapes = {
            name: names.hf_shape(weight, self.config)
            for weight in names.weights(self.config)
            for layer in names.layer_indices(weight, self.config)
            for name in names.tensor_names(weight, layer, self.config)
        }
        for name, tensor in self._tensors.items():
            if tensor.shape != shapes.get(name):
                raise UserError(
                    f"{file}: tensor {name} {list(tensor.shape)} is not one of this base's; is it "
                    "of another model?"
                )

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if not weight.per_expert:
            tensor = self._tensors.get(weight.tensor_name(layer))
            if tensor is None:
                return self.base.read(weight, layer)
            return tensor.read().T if weight.transpose else tensor.read()
        value = self.base.read(weight, layer, experts)
        trained = {
            position: self._tensors[name].read().T
            for position, expert in enumerate(range(*experts.indices(self.config.num_experts)))
            if (name := weight.tensor_name(layer, expert)) in self._tensors
        }
        return with_experts(value, trained)


def with_experts(value: np.ndarray, trained: dict[int, np.ndarray]) -> np.ndarray:
    """Returns experts' matrices [n, in, out] with the trained ones, by position, in their place."""
    if not trained:
        return value
    # float32 holds the base's and the trained values; an export rounds once.
    value = value.astype(np.float32)
    for position, matrix in trained.items():
        value[position] = matrix
    return value
