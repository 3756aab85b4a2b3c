"""Hugging Face checkpoints: checked when opened, read layer by layer, written shard by shard."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pydantic

from olmoe_jax.checkpoints import checksums, directory, names
from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.safetensors_file import (
    FileWriter,
    StoredTensor,
    assign,
    check_finite,
    in_c_order,
    read_header,
    refuse_pickles,
)
from olmoe_jax.checkpoints.source import Source, read_model_config
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, FileName, read_json
from olmoe_jax.model.config import ModelConfig

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
"""The dtypes of weights, by the names that config.json has for them."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HFCheckpoint(Source):
    """The weights of a Hugging Face checkpoint, its experts per tensor or fused.

    Opening reads the headers of all files and checks them. Of an export of this project it also
    checks the checksums, which reads the weights once.

    Raises:
      UserError: a file is missing, truncated or damaged; the index names an absent tensor, or there
        is another model beside it; a tensor is missing, unexpected or of the wrong shape; the
        architecture is not OLMoE's.
    """

    def __init__(self, path: Path):
        self.files = path
        self.config = read_model_config(path)
        checksums.check_weights(path)
        try:
            self._tensors = _locate_tensors(path)
            self._check()
        except UserError as error:
            # The field itself is no error: some writers leave it beside weights in full precision.
            if read_json(dict[str, Any], path / "config.json").get("quantization_config"):
                raise UserError(
                    f"{error}; config.json says that the weights are quantized: write the "
                    "checkpoint from which they were made"
                ) from None
            raise

    def dtype(self, weight: Weight) -> np.dtype:
        return self._matrix(weight, 0, 0).dtype

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if not weight.per_expert:
            value = self._tensors[weight.tensor_name(layer)].read()
            return value.T if weight.transpose else value
        num_experts, *shape = names.layer_shape(weight, self.config)
        wanted = range(*experts.indices(num_experts))
        value = np.empty((len(wanted), *shape), self.dtype(weight))

        def read(position: int) -> None:
            assign(value[position], self._matrix(weight, layer, wanted[position]).read().T)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read, range(len(wanted))))
        return value

    def _matrix(self, weight: Weight, layer: int | None, expert: int) -> StoredTensor:
        """Returns the place of one matrix: a tensor of its own, or a part of a fused tensor."""
        name = weight.tensor_name(layer, expert)
        if name in self._tensors or not weight.fused_name:
            return self._tensors[name]
        fused = self._tensors[weight.fused_name.format(layer=layer)]
        shape = names.hf_shape(weight, self.config)
        # The parts of an expert follow one another: gate of expert 0, up of expert 0, gate of 1.
        matrix = expert if weight.fused_part is None else 2 * expert + weight.fused_part
        offset = fused.offset + matrix * math.prod(shape) * fused.dtype.itemsize
        return dataclasses.replace(fused, offset=offset, shape=shape)

    def _expected(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes of the tensors that hold a weight, fused or not."""
        config, shape = self.config, names.hf_shape(weight, self.config)
        expected: dict[str, tuple[int, ...]] = {}
        for layer in names.layer_indices(weight, config):
            fused = weight.fused_name and weight.fused_name.format(layer=layer)
            if fused in self._tensors:
                parts = 1 if weight.fused_part is None else 2
                expected[fused] = (config.num_experts, parts * shape[0], shape[1])
            else:
                expected |= dict.fromkeys(names.tensor_names(weight, layer, config), shape)
        return expected

    def _check(self) -> None:
        """Raises a UserError unless the files hold this model's tensors and no others."""
        found = dict(self._tensors)
        if self.config.tie_word_embeddings:
            self._drop_tied_head(found)
        by_weight = [self._expected(weight) for weight in names.weights(self.config)]
        expected = {name: shape for tensors in by_weight for name, shape in tensors.items()}
        missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing:
            raise UserError(
                f"{self.files}: tensor {_first_of(missing)} is missing; the checkpoint is "
                "incomplete, or config.json is another model's"
            )
        if unexpected:
            raise UserError(
                f"{self.files}: unexpected tensor {_first_of(unexpected)}; config.json describes "
                "a model without it"
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise UserError(
                    f"{self.files}: tensor {name} has shape {list(found[name].shape)}, but "
                    f"config.json says {list(shape)}"
                )
        # A parameter stacks a weight's tensors in one array, which has one dtype.
        for tensors in by_weight:
            dtypes = {str(found[name].dtype) for name in tensors}
            if not dtypes <= DTYPES.keys():
                raise UserError(
                    f"{self.files}: tensor {min(tensors)} is {min(dtypes - DTYPES.keys())}; "
                    f"weights are read in {', '.join(DTYPES)}"
                )
            if len(dtypes) > 1:
                raise UserError(
                    f"{self.files}: {min(tensors)} and its like have several dtypes "
                    f"({', '.join(sorted(dtypes))}); store them in one"
                )

    def _drop_tied_head(self, found: dict[str, StoredTensor]) -> None:
        """Removes the copy of the embedding that some writers store as lm_head."""
        head = found.pop("lm_head.weight", None)
        embedding = found.get("model.embed_tokens.weight")
        # A head of its own would be lost in silence.
        if head and embedding and head.read().tobytes() != embedding.read().tobytes():
            raise UserError(
                f"{self.files}: lm_head.weight differs from the embedding, but config.json ties "
                "them; set tie_word_embeddings to false"
            )


def _first_of(tensors: Collection[str]) -> str:
    """Returns the first name, and how many more there are."""
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    return f"{min(tensors)}{more}"


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _Index:
    """The index of a checkpoint of several files: {tensor: file}."""

    weight_map: dict[str, FileName]


def _locate_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the place of every tensor of a checkpoint of one file or several."""
    if (path / _INDEX).exists():
        weight_map = read_json(_Index, path / _INDEX).weight_map
        files = sorted(set(weight_map.values()))
        if _SINGLE not in files and (path / _SINGLE).exists():
            # transformers would take the one file.
            raise UserError(
                f"{path}: holds {_SINGLE} and an index of other files, which may be two models; "
                "remove those that are not meant"
            )
    elif (path / _SINGLE).exists():
        weight_map, files = {}, [_SINGLE]
    else:
        refuse_pickles(path, "pytorch_model*.bin", _SINGLE)
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
    read: Callable[[Weight, int | None], np.ndarray],
    dtype: Callable[[Weight], np.dtype],
    max_shard_bytes: int,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a model's weights into an existing directory, one tensor for each expert.

    One layer's weight is in memory at a time.

    Args:
      output: the directory.
      config: the model's architecture.
      read: as `Source.read`, with weights in any float dtype.
      dtype: returns the dtype in which to store a weight.
      max_shard_bytes: no file grows larger (but a tensor is never split). Several files get an
        index.
      allow_nonfinite: write weights that are not finite.

    Raises:
      TooLargeError: a weight is too large for its dtype.
      UserError: a weight is not finite.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    # The tensors of a layer lie together, as in Hugging Face's own files: a reader of layers
    # then reads each file from front to back.
    pieces = [
        (weight, layer)
        for weight in names.weights(config)
        for layer in names.layer_indices(weight, config)
    ]
    pieces.sort(key=lambda piece: -1 if piece[1] is None else piece[1])
    tensors = {
        name: (dtype(weight), names.hf_shape(weight, config))
        for weight, layer in pieces
        for name in names.tensor_names(weight, layer, config)
    }
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor[1]) * tensor[0].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    writers: dict[str, FileWriter] = {}

    def stored(weight: Weight, named: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
        name, value = named
        cast = in_c_order(_cast(name, value, dtype(weight)))
        if not allow_nonfinite:
            check_finite(name, cast)  # as it is stored: the cast may have made it infinite
        return name, cast

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for weight, layer in pieces:
            values = names.to_hf(weight, layer, read(weight, layer))
            for name, value in pool.map(functools.partial(stored, weight), values):
                file = shards.tensor_to_filename[name]
                inside = shards.filename_to_tensors[file]
                if name == inside[0]:
                    # The header comes before the tensors.
                    header = {each: tensors[each] for each in inside}
                    writers[file] = FileWriter(output / file, header)
                writers[file].write(name, value)
                if name == inside[-1]:
                    writers.pop(file).close()
    if shards.is_sharded:
        weight_map = dict(sorted(shards.tensor_to_filename.items()))
        directory.write_json(
            output / _INDEX, {"metadata": shards.metadata, "weight_map": weight_map}
        )


class TooLargeError(ValueError):
    """A weight does not fit the dtype in which it should be stored."""


def _cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        cast = value.astype(dtype, copy=False)
    # bfloat16 reaches as far as float32.
    narrower = dtype == np.float16 or value.dtype == np.float64
    if narrower and (np.isinf(cast) & np.isfinite(value)).any():
        raise TooLargeError(f"tensor {name} has numbers that are too large for {dtype}")
    return cast


def write_config(output: Path, files: Path, dtype: str | None) -> None:
    """Copies config.json, the generation config and the tokenizer from `files`.

    The copied config.json says `dtype`; None leaves the file as it is, byte for byte.
    """
    directory.copy_files(files, output, (*directory.MODEL_FILES, *directory.TOKENIZER_FILES))
    if dtype is None:
        return
    config = read_json(dict[str, Any], files / "config.json")
    # transformers 5 writes dtype, transformers 4 torch_dtype.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def serving_warnings(config: ModelConfig) -> list[str]:
    """Returns a line for each setting that servers hard-code otherwise for OLMoE."""
    differs = {
        f"rms_norm_eps={config.rms_norm_eps}": config.rms_norm_eps != 1e-5,
        "norm_topk_prob=true": config.norm_topk_prob,
        f"clip_qkv={config.clip_qkv}": config.clip_qkv is not None,
    }
    return [
        f"{setting}: vLLM, SGLang and llama.cpp ignore this setting of OLMoE and will give other "
        "outputs"
        for setting, applies in differs.items()
        if applies
    ]
