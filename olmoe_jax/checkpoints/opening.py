"""Opening checkpoints of any kind: Hugging Face's, converted ones, and those of training runs.

A training run's checkpoint holds what the run trained. The frozen rest comes from the run's base,
which is a checkpoint of any kind again: `open_source` and `RunCheckpoint` call each other.
"""

import concurrent.futures
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from olmoe_jax.checkpoints import checksums, directory, names
from olmoe_jax.checkpoints.expert_config import read_expert_config
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.merging import merged
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.orbax import PARAMETERS, ConvertedCheckpoint, OrbaxArrays
from olmoe_jax.checkpoints.overrides import with_experts
from olmoe_jax.checkpoints.peft import CONFIG_FILE, adapted, adapter_directory, parameter_names
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY, Source, read_model_config
from olmoe_jax.errors import UserError
from olmoe_jax.files import absolute, read_json
from olmoe_jax.hub import is_hub_id
from olmoe_jax.model.config import LoraSettings, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.tuned import HOLDERS, places

if TYPE_CHECKING:
    from tensorstore import TensorStore

CHECKPOINTS = "checkpoints"
"""In a run's directory: the folder with an Orbax checkpoint for each saved step."""
EXPERTS = "experts.json"
"""In the directory of a run that tunes experts: the expert config with these experts."""
BASE = "base weights"
"""In the identity of a run's checkpoint: what `weights_identity` returned of the run's base."""

_READERS = 4
"""Threads that hash weights. Each holds one layer's weight, of the 7B model at most 0.3 GB."""


def open_source(path_or_hub_id: str, step: int | None = None, base: str | None = None) -> Source:
    """Opens a checkpoint; what the directory holds tells its kind.

    Args:
      path_or_hub_id: a directory, or a Hugging Face hub id.
      step: of a training run: which checkpoint; None: the latest.
      base: of a training run: where its base lies now; None: where it lay.

    Raises:
      UserError: the checkpoint is missing, incomplete, damaged, or of another architecture;
        `base` is not the run's; or `base` or `step` is given and the checkpoint is no run's.
    """
    path = directory.resolve(path_or_hub_id)
    if is_run(path):
        return RunCheckpoint(path, step, base)
    for flag, value in (("base", base), ("step", step)):
        if value is not None:
            raise UserError(f"--{flag} {value}: {path} is not a training run; leave --{flag} out")
    if not (path / PARAMETERS).is_dir():
        return HFCheckpoint(path)
    if (path / checksums.FILE).exists():
        checksums.check(path, "convert it again with convert.from_hf")
    else:
        _warn(f"{path}: {_NO_CHECKSUMS}; convert it again to have them")
    return ConvertedCheckpoint(path)


def is_run(path: Path) -> bool:
    """Returns whether a directory is a training run's, perhaps a damaged one."""
    if not (path / CHECKPOINTS).is_dir() or (path / PARAMETERS).is_dir():
        return False
    # Beside a model in Hugging Face's format, a folder of this name can be anything.
    is_model = any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    return (path / MODEL_DIRECTORY).is_dir() or (bool(steps(path)) and not is_model)


def weights_identity(source: Source) -> dict[str, str]:
    """Returns {"content": hash of all weights}: the same for all files that hold these weights.

    The files may split the weights otherwise, or be of another kind of checkpoint. All weights are
    read.
    """
    if isinstance(source, RunCheckpoint) and source.lora:
        # The rounding of a merged weight is the machine's.
        parts = [weights_identity(source.opened_base)["content"]]
        trained = sorted(source.trained().items())
        parts += [f"{name} {_checksum(value)}" for name, value in trained]
    else:
        config = source.config
        pieces = [(w, i) for w in names.weights(config) for i in names.layer_indices(w, config)]
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            sums = pool.map(lambda piece: _checksum(source.read(*piece)), pieces)
            parts = [f"{w.name} {i} {total}" for (w, i), total in zip(pieces, sums, strict=True)]
    return {"content": xxhash.xxh3_128_hexdigest("\n".join(parts).encode())}


def _checksum(value: np.ndarray) -> str:
    content = np.ascontiguousarray(value).view(np.uint8)
    return f"{value.dtype} {value.shape} {xxhash.xxh3_128_hexdigest(content)}"


def check_adapter(source: Source, model: str, adapter: str | Path) -> None:
    """Checks that an adapter goes beside a checkpoint; warns where it names another base.

    A LoRA run's checkpoint has its adapter merged: beside it, the adapter would count twice.

    Args:
      source: the checkpoint.
      model: the checkpoint's directory or hub id.
      adapter: as for `adapter_directory`.

    Raises:
      UserError: the checkpoint is that of the run which made the adapter, or there is no adapter.
    """
    path = adapter_directory(str(adapter))
    run = source if isinstance(source, RunCheckpoint) and source.lora else None
    if run and path.resolve().parent == run.path.resolve():
        raise UserError(
            f"{run.path}: has its adapter merged already; leave {adapter} out, or write the run's "
            f"base, {run.base}, in the place of the run"
        )
    base = read_json(dict[str, Any], path / CONFIG_FILE).get("base_model_name_or_path")
    # Where a directory is from, nobody knows.
    on_hub = isinstance(base, str) and is_hub_id(base) and is_hub_id(model)
    if on_hub and base != model and not os.path.exists(model):
        _warn(f"{adapter}: its base is {base}, not {model}; the outputs are wrong if these differ")


class RunCheckpoint(Source):
    """The weights of a training run's checkpoint: adapters merged, tuned experts in place."""

    def __init__(self, path: Path, step: int | None = None, base: str | None = None):
        self.path, self.files = path, path / MODEL_DIRECTORY
        check_files(path)
        self.config = read_model_config(self.files)
        self.step = latest_step(path) if step is None else step
        if self.step not in steps(path):
            raise UserError(f"{path}: no checkpoint of step {self.step}; there are {steps(path)}")
        if step is not None and (reason := step_damage(path, step)):
            raise UserError(
                f"{unreadable(path, step, reason)}; restore it from a copy, or write another step"
            )
        self.checkpoint = path / CHECKPOINTS / str(self.step)  # the directory
        item = self.checkpoint / "state"
        self.lora = LoraSettings.of_method(self.run_config["method"])
        file = path / EXPERTS
        self.experts = read_expert_config(file, self.config) if file.exists() else None
        self._tuned = places(self.experts.experts) if self.experts else []
        tuned_experts = self.experts.experts if self.experts else None
        settings = ModelSettings(lora=self.lora, tuned_experts=tuned_experts)
        self._specs = parameter_specs(self.config, settings)
        self._arrays = OrbaxArrays(item)
        self._stored = _stored_parameters(item)
        # The hub id or directory of the model from which the run started.
        self.base = self.run_config["model"]["path"] if base is None else absolute(base)
        if base is not None:
            _ = self.opened_base  # a wrong one is refused, whether or not a weight is read from it

    @functools.cached_property
    def run_config(self) -> dict[str, Any]:
        """The run's configuration, which says what the run trains and on which base."""
        return read_json(dict[str, Any], self.path / "config.json")

    @functools.cached_property
    def opened_base(self) -> Source:
        """The base.

        Raises:
          UserError: the base is not there, or has other weights than at the start of the run.
        """
        advice = (
            "write where the run's base lies with --base DIR (of convert.to_hf, olmoe_jax.generate "
            "and eval.run)"
        )
        try:
            base = open_source(self.base)
        except UserError as error:
            raise UserError(f"{self.path} needs its base: {error}; {advice}") from None
        file = self.checkpoint / "identity" / "metadata"
        # Earlier versions kept no identity of the base.
        began_with = read_json(dict[str, Any], file).get(BASE) if file.exists() else None
        if began_with and began_with != weights_identity(base):
            raise UserError(f"{self.base} has other weights than the base of {self.path}; {advice}")
        return base

    def dtype(self, weight: Weight) -> np.dtype:
        if weight.name not in self._stored:
            return self.opened_base.dtype(weight)
        return self._array(weight.name).dtype.numpy_dtype

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        value = self._read_stored_or_base(weight, layer, experts)
        if self.lora and weight in adapted(self.lora):
            a, b = (self._array(name)[layer] for name in parameter_names(weight))
            if weight.per_expert:
                a, b = a[experts], b[experts]
            return merged(value, a.read().result(), b.read().result(), self.lora)
        if self._tuned and weight.per_expert:
            return with_experts(value, self._read_tuned(weight, layer, experts))
        return value

    def _read_stored_or_base(self, weight: Weight, layer: int | None, experts: slice) -> np.ndarray:
        """Reads a weight without its adapter, and without the experts that were tuned."""
        if weight.name not in self._stored:
            return self.opened_base.read(weight, layer, experts)
        array = self._array(weight.name)
        if layer is not None:
            array = array[layer]
        return (array[experts] if weight.per_expert else array).read().result()

    def _read_tuned(
        self, weight: Weight, layer: int | None, experts: slice
    ) -> dict[int, np.ndarray]:
        """Reads the tuned ones among a layer's wanted experts: {position in `experts`: matrix}."""
        array = self._array(HOLDERS[weight.name])
        wanted = range(*experts.indices(self.config.num_experts))
        return {
            wanted.index(expert): array[place].read().result()
            for place, (at_layer, expert) in enumerate(self._tuned)
            if at_layer == layer and expert in wanted
        }

    def trained(self) -> dict[str, np.ndarray]:
        """Reads all trained parameters, by name. Meant for adapters, which are small."""
        return {
            name: self._array(name).read().result()
            for name, path in self._stored.items()
            if path.startswith("parameters.")
        }

    def check_losses(self) -> None:
        # A checkpoint keeps the losses that the run had when it saved.
        file = self.checkpoint / "report" / "metadata"
        report = read_json(dict[str, Any], file) if file.exists() else {}
        if bad := report.get("nonfinite"):
            raise UserError(
                f"{self.path}: {bad[0]} is not finite at step {self.step}; export another step "
                "with convert.to_hf --step, or this one with --allow_nonfinite"
            )

    def export_dtype(self) -> str | None:
        config = read_json(dict[str, Any], self.files / "config.json")
        wanted = self.run_config["train"].get("export_dtype")
        return wanted or config.get("dtype") or config.get("torch_dtype") or "float32"

    def _array(self, name: str) -> "TensorStore":
        return self._arrays.open(self._stored[name], self._specs[name].shape)


def _stored_parameters(item: Path) -> dict[str, str]:
    """Returns {parameter name: its path} in a checkpoint: `parameters.NAME` or `frozen.NAME`.

    The rest of the checkpoint is the optimizer's state.
    """
    stored = {}
    for leaf in read_json(dict[str, Any], item / "_METADATA")["tree_metadata"].values():
        group, name = (leaf["key_metadata"][position]["key"] for position in (0, -1))
        if group in ("parameters", "frozen"):
            # Runs of the first version call the tuned experts "selected".
            stored[name.replace("selected.", "tuned.")] = f"{group}.{name}"
    return stored


def steps(run: Path) -> list[int]:
    """Returns the steps of a run's committed checkpoints, ascending."""
    found = (run / CHECKPOINTS).glob("*") if (run / CHECKPOINTS).is_dir() else []
    return sorted(int(path.name) for path in found if path.name.isdigit())


def latest_step(run: Path) -> int:
    """Returns the step of the newest checkpoint that is not damaged; says what is.

    Raises:
      UserError: the run has no such checkpoint.
    """
    for step in reversed(steps(run)):
        reason = step_damage(run, step)
        if reason is None:
            return step
        _warn(f"{unreadable(run, step, reason)}; going back to the one before")
    raise UserError(f"{run}: holds no checkpoint to read; wait for the first or train longer")


def step_damage(run: Path, step: int, share: slice = slice(None), folder: str = "") -> str | None:
    """Returns what is wrong with a checkpoint, or None.

    Args:
      run: the run's directory.
      step: the checkpoint's step.
      share: which of the checkpoint's files to check.
      folder: the folder in the checkpoint, with a slash at its end, whose files to check.
    """
    if is_without_checksums(run):
        return None
    path = run / CHECKPOINTS / str(step)
    return checksums.damage(path, lambda name: name.startswith(folder), share)


def check_files(run: Path) -> None:
    """Checks the files of a run outside its checkpoints: configuration, model and experts.

    Raises:
      UserError: one is damaged or missing.
    """
    if is_without_checksums(run):
        _warn(f"{run}: {_NO_CHECKSUMS}")
        return
    for path in (run, run / MODEL_DIRECTORY):
        checksums.check(path, "restore the file from a copy")


def is_without_checksums(run: Path) -> bool:
    """Returns whether an earlier version wrote a run, without any checksums."""
    places = [run, run / MODEL_DIRECTORY, *(run / CHECKPOINTS).glob("*")]
    return not any(os.path.lexists(path / checksums.FILE) for path in places)


def unreadable(run: Path, step: int, reason: str) -> str:
    """Returns the beginning of a message about a damaged checkpoint."""
    return f"{run}: the checkpoint of step {step} cannot be read ({reason})"


_NO_CHECKSUMS = (
    "an earlier version of olmoe_jax wrote it, without checksums; damage would not be noticed"
)


@functools.cache
def _warn(message: str) -> None:
    """Prints a line once, and not among a command's data."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
