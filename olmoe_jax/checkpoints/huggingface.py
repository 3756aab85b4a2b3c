"""Hugging Face checkpoints: validated when opened, read layer by layer, written shard by shard."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from olmoe_jax.checkpoints import directory, names
from olmoe_jax.checkpoints.safetensors_file import FileWriter, StoredTensor, read_header
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelConfig, model_config_from_hf

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HFCheckpoint:
    """An OLMoE checkpoint in Hugging Face's format: per-expert or fused, one file or shards.

    Everything is checked on opening, before a weight is read.

    Raises:
      UserError: a shard is missing or truncated; the index names an absent tensor; a tensor is
        missing, unexpected or of the wrong shape; another architecture.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = model_config_from_hf(
            directory.read_json(path / "config.json"), str(path / "config.json")
        )
        self._tensors = _locate_tensors(path)
        self._check()

    @property
    def files(self) -> Path:
        """The directory with config.json and, where there is one, the tokenizer."""
        return self.path

    def dtype(self, row: names.Row) -> np.dtype:
        """The dtype in which this weight is stored."""
        return self._matrix(row, 0, 0).dtype

    def read(self, row: names.Row, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        """One layer's weight in our layout and the stored dtype; of its experts, this slice."""
        if not row.per_expert:
            value = self._tensors[row.theirs.format(layer=layer)].read()
            return value.T if row.transpose else value
        num_experts, *shape = names.layer_shape(row, self.config)
        wanted = range(*experts.indices(num_experts))
        out = np.empty((len(wanted), *shape), self.dtype(row))
        for position, expert in enumerate(wanted):
            out[position] = self._matrix(row, layer, expert).read().T
        return out

    def export_dtype(self) -> str | None:
        """None: exports keep each weight's dtype."""
        return None

    def _matrix(self, row: names.Row, layer: int | None, expert: int) -> StoredTensor:
        """Where one matrix lies: a tensor of its own, or a part of a fused one."""
        name = row.theirs.format(layer=layer, expert=expert)
        if name in self._tensors or not row.fused:
            return self._tensors[name]
        fused = self._tensors[row.fused.format(layer=layer)]
        shape = names.hf_shape(row, self.config)
        matrix = expert if row.fused_part is None else 2 * expert + row.fused_part
        offset = fused.offset + matrix * math.prod(shape) * fused.dtype.itemsize
        return dataclasses.replace(fused, offset=offset, shape=shape)

    def _expected(self, row: names.Row) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that hold this row, in the layout found here."""
        config, shape, expected = self.config, names.hf_shape(row, self.config), {}
        for layer in names.layer_indices(row, config):
            fused = row.fused and row.fused.format(layer=layer)
            if fused in self._tensors:
                parts = 1 if row.fused_part is None else 2
                expected[fused] = (config.num_experts, parts * shape[0], shape[1])
                continue
            for expert in range(config.num_experts) if row.per_expert else [None]:
                expected[row.theirs.format(layer=layer, expert=expert)] = shape
        return expected

    def _check(self) -> None:
        found = dict(self._tensors)
        if self.config.tie_word_embeddings:
            self._drop_tied_head(found)
        by_row = {row.ours: self._expected(row) for row in names.rows(self.config)}
        expected = {name: shape for part in by_row.values() for name, shape in part.items()}
        missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing:
            raise UserError(
                f"{self.path}: tensor {min(missing)} is missing{_and_more(missing)}; the "
                "checkpoint is incomplete or config.json is another model's"
            )
        if unexpected:
            raise UserError(
                f"{self.path}: unexpected tensor {min(unexpected)}{_and_more(unexpected)}; "
                "config.json describes a model without it"
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise UserError(
                    f"{self.path}: tensor {name} has shape {list(found[name].shape)}, but "
                    f"config.json says {list(shape)}"
                )
        for part in by_row.values():
            dtypes = {str(found[name].dtype) for name in part}
            if len(dtypes) > 1:
                raise UserError(
                    f"{self.path}: {min(part)} and its like have several dtypes "
                    f"({', '.join(sorted(dtypes))}); store them in one"
                )

    def _drop_tied_head(self, found: dict[str, StoredTensor]) -> None:
        """Some writers repeat the embedding as lm_head; another head would be lost silently."""
        head = found.pop("lm_head.weight", None)
        embedding = found.get("model.embed_tokens.weight")
        if head and embedding and head.read().tobytes() != embedding.read().tobytes():
            raise UserError(
                f"{self.path}: lm_head.weight differs from the embedding, but config.json ties "
                "them; set tie_word_embeddings to false"
            )


def _and_more(names_: set[str]) -> str:
    return f" (and {len(names_) - 1} more)" if len(names_) > 1 else ""


def _locate_tensors(path: Path) -> dict[str, StoredTensor]:
    if (path / _INDEX).exists():
        weight_map = directory.read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{path / _INDEX}: has no object weight_map; copy or download it again")
        files = sorted(set(weight_map.values()))
    elif (path / _SINGLE).exists():
        weight_map, files = {}, [_SINGLE]
    else:
        raise UserError(f"{path}: holds neither {_SINGLE} nor {_INDEX}; is it a checkpoint?")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(path / file).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in {tensors[name].file.name} and {file}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{path}: {_INDEX} names {name} in {file}, but it is not there")
    return tensors


def write_checkpoint(
    output: Path,
    config: ModelConfig,
    read: Callable[[names.Row, int | None], np.ndarray],
    dtype: Callable[[names.Row], np.dtype],
    max_shard_bytes: int,
) -> None:
    """Writes the weights into an existing directory, per-expert tensors, one layer in memory.

    Args:
      read: gives one layer's weight in our layout, any float dtype.
      dtype: the dtype in which to store it.
      max_shard_bytes: a file is closed before it would grow beyond this; above one file an index
        is written.
    """
    # Layers together, as in Hugging Face's files: what is read together lies together.
    pieces = [
        (row, layer) for row in names.rows(config) for layer in names.layer_indices(row, config)
    ]
    pieces.sort(key=lambda piece: -1 if piece[1] is None else piece[1])
    shards = _plan_shards(pieces, config, dtype, max_shard_bytes)
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = [_SINGLE] if count == 1 else files
    current, writer = 0, FileWriter(output / files[0], shards[0])
    for row, layer in pieces:
        for name, tensor in names.to_hf(row, layer, read(row, layer)):
            if name not in shards[current]:
                writer.close()
                current += 1
                writer = FileWriter(output / files[current], shards[current])
            writer.write(name, tensor.astype(dtype(row), copy=False))
    writer.close()
    if count > 1:
        total = sum(_bytes(*entry) for shard in shards for entry in shard.values())
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        directory.write_json(output / _INDEX, index)


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _plan_shards(pieces, config, dtype, max_shard_bytes) -> list[dict]:
    """For each file, {tensor name: (dtype, shape)} in the order of writing."""
    shards, size = [{}], 0
    for row, layer in pieces:
        entry = (dtype(row), names.hf_shape(row, config))
        for expert in range(config.num_experts) if row.per_expert else [None]:
            if shards[-1] and size + _bytes(*entry) > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][row.theirs.format(layer=layer, expert=expert)] = entry
            size += _bytes(*entry)
    return shards


def write_config(output: Path, source: Path, dtype: str | None) -> None:
    """Copies config.json, the generation config and the tokenizer; notes the weights' dtype."""
    directory.copy_files(source, output, (*directory.MODEL_FILES, *directory.TOKENIZER_FILES))
    config = directory.read_json(source / "config.json")
    if dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = dtype
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def serving_warnings(config: ModelConfig) -> list[str]:
    """What serving engines that hard-code OLMoE's settings would silently compute differently."""
    checks = {
        f"rms_norm_eps={config.rms_norm_eps}": config.rms_norm_eps != 1e-5,
        "norm_topk_prob=true": config.norm_topk_prob,
        f"clip_qkv={config.clip_qkv}": config.clip_qkv is not None,
    }
    return [
        f"{field}: vLLM and SGLang ignore this setting for OLMoE and will give other outputs"
        for field, applies in checks.items()
        if applies
    ]
