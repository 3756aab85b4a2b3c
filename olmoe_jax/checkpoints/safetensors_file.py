"""Safetensors files, read and written tensor by tensor in bounded memory.

The format (https://github.com/huggingface/safetensors): the header's length in 8 little-endian
bytes, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes. Plain reads
instead of a memory map keep the pages of a file out of this process's resident memory.
"""

import dataclasses
import json
import math
import os
import shlex
import struct
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import pydantic

from olmoe_jax.errors import UserError
from olmoe_jax.files import SIZE_LIMIT, STRICT, decode, open_regular, os_errors, validate

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_Offset = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COLUMNS = 8
_BLOCK = 1 << 17
"""Numbers that are looked at together: they stay in a core's cache."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: file, position of its first byte in the file, dtype and shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position after the last byte."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the tensor."""
        count = math.prod(self.shape)
        return np.fromfile(self.file, self.dtype, count, offset=self.offset).reshape(self.shape)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor in a file's header."""

    dtype: str
    shape: list[Annotated[int, pydantic.Field(ge=0, lt=2**40)]]
    data_offsets: tuple[_Offset, _Offset]


_CONVERT = (
    "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() "
    "for f in sys.argv[2:] for k, v in torch.load(f, 'cpu', weights_only=True).items()}, "
    "sys.argv[1], {'format': 'pt'})"
)


def refuse_pickles(path: Path, pattern: str, instead: str) -> None:
    """Raises a UserError if a directory holds weights as torch's pickles.

    A pickle can run any program. The message has a command that makes the safetensors file
    `instead` of the files whose names match `pattern`.
    """
    if pickles := sorted(path.glob(pattern)):
        files = " ".join(shlex.quote(str(file)) for file in (path / instead, *pickles))
        raise UserError(
            f"{pickles[0]}: a pickle, which can run any program, is not read; convert it: "
            f'python -c "{_CONVERT}" {files}'
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, by name, without reading them.

    Raises:
      UserError: the file is missing, shorter than its header says, or not safetensors.
    """
    with os_errors(file, "read"), open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, SIZE_LIMIT):
            raise UserError(
                f"{file}: truncated or not a safetensors file; copy or download it again"
            )
        content = stream.read(length)
    header = decode(dict[str, dict[str, Any]], content, f"{file}: header")
    header.pop("__metadata__", None)
    tensors = {
        name: _locate(file, 8 + length, name, validate(_Entry, entry, f"{file}: tensor {name}"))
        for name, entry in header.items()
    }
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if size < end:
        raise UserError(
            f"{file}: truncated: {size} bytes of {end}; copy or download this shard again"
        )
    return tensors


def _locate(file: Path, start: int, name: str, entry: _Entry) -> StoredTensor:
    """Returns the place of a tensor; `start` is the position of the first tensor's first byte."""
    if entry.dtype not in _DTYPES:
        raise UserError(
            f"{file}: tensor {name} has unsupported dtype {entry.dtype}; save it as BF16 or F32"
        )
    first, last = entry.data_offsets
    tensor = StoredTensor(file, start + first, _DTYPES[entry.dtype], tuple(entry.shape))
    if tensor.end != start + last:
        raise UserError(
            f"{file}: tensor {name}: shape {entry.shape} and {last - first} bytes do not agree; "
            "copy or download this shard again"
        )
    return tensor


class FileWriter:
    """A safetensors file that is being written.

    Args:
      file: the path.
      tensors: {name: (dtype, shape)} of all tensors in the order in which they will be written:
        the header, which has them all, comes first.
    """

    def __init__(self, file: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            last = offset + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, last],
            }
            offset = last
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._pending = list(tensors.items())[::-1]
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, value: np.ndarray) -> None:
        """Appends the next announced tensor."""
        expected, (dtype, shape) = self._pending.pop()
        if (name, value.dtype, value.shape) != (expected, dtype, shape):
            raise ValueError(
                f"{name} {value.dtype} {value.shape}: expected {expected} {dtype} {shape}"
            )
        self._stream.write(in_c_order(value).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Closes the file, which must be complete."""
        self._stream.close()
        if self._pending:
            raise ValueError(f"{self._pending[-1][0]} was never written")


def save(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a dict of arrays as one file."""
    writer = FileWriter(file, {name: (t.dtype, t.shape) for name, t in tensors.items()})
    for name, value in tensors.items():
        writer.write(name, value)
    writer.close()


def load(file: Path) -> dict[str, np.ndarray]:
    """Reads a whole file as a dict of arrays."""
    return {name: tensor.read() for name, tensor in read_header(file).items()}


def in_c_order(value: np.ndarray) -> np.ndarray:
    """Returns the values in C order: a copy of a transposed matrix, else `value` itself."""
    if value.flags.c_contiguous or value.ndim != 2:
        return np.ascontiguousarray(value)
    copy = np.empty(value.shape, value.dtype)
    assign(copy, value)
    return copy


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """Copies a transposed matrix [R, C] into one in C order, of the same dtype.

    A few columns at a time take half the time of numpy's own copy, in which each write of two
    bytes waits for another line of the cache (`benchmarks.conversion`).
    """
    # ml_dtypes' own copies go through a function call for each number.
    bits = np.dtype(f"u{source.itemsize}")
    source, target = source.view(bits), target.view(bits)
    for start in range(0, source.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        target[:, columns] = source[:, columns]


def check_finite(name: str, value: np.ndarray) -> None:
    """Checks the values of a tensor that is written for others to use.

    Raises:
      UserError: one is NaN or infinite.
    """
    # The exponent's bits of NaN and infinity are all 1. np.isfinite is slow for bfloat16.
    bits = np.dtype(f"u{value.itemsize}")
    exponent = np.array(np.inf, value.dtype).view(bits)
    flat = value.T.reshape(-1) if value.flags.f_contiguous else value.reshape(-1)
    flat = flat.view(bits)
    if any(
        ((flat[start : start + _BLOCK] & exponent) == exponent).any()
        for start in range(0, flat.size, _BLOCK)
    ):
        raise UserError(
            f"tensor {name} holds NaN or infinite values; take another checkpoint, or write "
            "--allow_nonfinite (convert.from_hf, to_hf, merge_lora) to have it nevertheless"
        )
