"""A directory of trained tensors only (ESFT): some of a checkpoint's tensors, to put over a base.

`trained.safetensors` holds them under Hugging Face's names and layout, `expert_config.json` says
which experts they are.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints import directory, names, safetensors_file
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError

WEIGHTS = "trained.safetensors"
CONFIG = "expert_config.json"


def write_overrides(
    output: Path, tensors: Iterable[tuple[str, np.ndarray]], experts: ExpertConfig
) -> None:
    """Writes trained tensors (Hugging Face names) into an existing directory."""
    safetensors_file.save(output / WEIGHTS, dict(tensors))
    directory.write_json(output / CONFIG, experts.to_json())


class OverriddenSource:
    """A base with the trained tensors of a directory in the place of its own.

    Raises:
      UserError: a tensor is not one of this model's, or has another shape.
    """

    def __init__(self, base: Source, path: Path):
        self.config, self.files, self._base = base.config, base.files, base
        self._tensors = safetensors_file.read_header(path / WEIGHTS)
        self._places = {}
        for row in names.rows(self.config):
            for layer in names.layer_indices(row, self.config):
                for expert in range(self.config.num_experts) if row.per_expert else [None]:
                    self._places[row.theirs.format(layer=layer, expert=expert)] = row
        for name, tensor in self._tensors.items():
            expected = name in self._places and names.hf_shape(self._places[name], self.config)
            if tensor.shape != expected:
                raise UserError(
                    f"{path / WEIGHTS}: tensor {name} {list(tensor.shape)} is not one of this "
                    "base's; is it of another model?"
                )

    def dtype(self, row: names.Row) -> np.dtype:
        return self._base.dtype(row)

    def export_dtype(self) -> str | None:
        return self._base.export_dtype()

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if not row.per_expert:
            stored = self._tensors.get(row.theirs.format(layer=layer))
            if stored is None:
                return self._base.read(row, layer)
            return stored.read().T if row.transpose else stored.read()
        weight = self._base.read(row, layer, experts)
        for position, expert in enumerate(range(*experts.indices(self.config.num_experts))):
            stored = self._tensors.get(row.theirs.format(layer=layer, expert=expert))
            if stored is not None:
                # float32 holds both; what is exported is rounded once.
                weight = weight.astype(np.float32)
                weight[position] = stored.read().T
        return weight
