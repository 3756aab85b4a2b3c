"""Safetensors files, read and written tensor by tensor in bounded memory.

The format (https://github.com/huggingface/safetensors): the header's length in 8 little-endian
bytes, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes. Plain reads
instead of a memory map keep the pages of a file out of this process's resident memory.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from olmoe_jax.errors import UserError

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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: file, position of its first byte in the file, dtype and shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads the rows start…stop of the first dimension; a scalar whole."""
        if not self.shape:
            return np.fromfile(self.file, self.dtype, 1, offset=self.offset).reshape(())
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:])
        offset = self.offset + start * row * self.dtype.itemsize
        data = np.fromfile(self.file, self.dtype, (stop - start) * row, offset=offset)
        return data.reshape(stop - start, *self.shape[1:])


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, by name, without reading them.

    Raises:
      UserError: the file is missing, shorter than its header says, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header does not fit")
            tensors, end = _parse(file, json.loads(stream.read(length)), 8 + length)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; copy the missing shard there") from None
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{file}: truncated or not a safetensors file; copy or download it again"
        ) from None
    if size < end:
        raise UserError(
            f"{file}: truncated: {size} bytes of {end}; copy or download this shard again"
        )
    return tensors


def _parse(file: Path, header: dict, start: int) -> tuple[dict[str, StoredTensor], int]:
    """Returns the tensors of a header, and the position at which the last one ends.

    `start` is the position in the file of the first tensor's first byte.
    """
    tensors, end = {}, start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{file}: tensor {name} has unsupported dtype {entry['dtype']}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: shape and number of bytes do not agree")
        tensors[name] = StoredTensor(file, start + first, dtype, shape)
        end = max(end, start + last)
    return tensors, end


class FileWriter:
    """A safetensors file that is being written. The tensors come in the announced order.

    Args:
      file: the path.
      tensors: {name: (dtype, shape)} of all tensors. The header, which comes first, needs them.
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
        self._stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

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
