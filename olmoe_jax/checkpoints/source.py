"""The interface through which weights are read, whatever kind of checkpoint holds them.

`olmoe_jax.checkpoints.opening.open_source` opens a checkpoint of any kind as a `Source`. Sources
also stack: a PEFT adapter (`merging.MergedSource`) or ESFT's trained tensors
(`overrides.OverriddenSource`) over a base.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from olmoe_jax.checkpoints.directory import ADAPTER_FILES
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json
from olmoe_jax.model.config import ModelConfig, model_config_from_hf

MODEL_DIRECTORY = "model"
"""In the directory of a run or a converted checkpoint: the folder that `Source.files` names."""


class Source(Protocol):
    """The weights of an OLMoE model on disk."""

    config: ModelConfig
    files: Path
    """The directory with config.json, the generation config and the tokenizer."""

    def dtype(self, weight: Weight) -> np.dtype:
        """Returns the dtype in which a weight is stored."""

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        """Reads one layer's weight.

        Args:
          weight: which one.
          layer: which layer's; None for a weight outside the layers.
          experts: of an expert weight, the experts to read.

        Returns:
          The weight as [in, out] or [experts, in, out], in the stored dtype. Sources that
          compute a weight (W + scale * A B) return it in float32.
        """

    def export_dtype(self) -> str | None:
        """Returns the dtype of an export for which the user names none; None: as stored."""
        return None

    def check_losses(self) -> None:
        """Checks the losses of the run that trained the weights; other weights have none.

        Raises:
          UserError: one is not finite.
        """


class ChangedSource(Source):
    """The weights of another source, its base, of which some are changed."""

    def __init__(self, base: Source):
        self.config, self.files, self.base = base.config, base.files, base

    def dtype(self, weight: Weight) -> np.dtype:
        return self.base.dtype(weight)

    def export_dtype(self) -> str | None:
        return self.base.export_dtype()

    def check_losses(self) -> None:
        self.base.check_losses()


def read_model_config(files: Path) -> ModelConfig:
    """Reads the architecture from a directory's config.json.

    Raises:
      UserError: the file is missing or damaged, or describes no OLMoE model; or the directory is an
        adapter's.
    """
    file = files / "config.json"
    if not file.exists() and any((files / name).exists() for name in ADAPTER_FILES):
        raise UserError(
            f"{files}: holds an adapter and no model; write its base here, and the adapter as "
            "--adapter or method.adapter_path, or merge the two with convert.merge_lora"
        )
    return model_config_from_hf(read_json(dict[str, Any], file), str(file))
