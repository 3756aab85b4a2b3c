"""Directories of one-dimensional arrays, each either whole or absent."""

import contextlib
import itertools
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints.directory import write_json
from olmoe_jax.errors import UserError
from olmoe_jax.files import open_regular, read_json

_CHECKS = "checks.json"
_PUBLISH_ATTEMPTS = 3
_DTypes = Mapping[str, type[np.generic]]


def load_arrays(directory: Path, dtypes: _DTypes) -> dict[str, np.ndarray] | None:
    """Returns the memory-mapped arrays that `save_arrays` wrote.

    Returns None if the directory is absent, or one of its files is missing, truncated or altered.
    """
    try:
        checks = read_json(dict[str, tuple[int, int]], directory / _CHECKS)
        if checks != {name: _check(directory / name) for name in dtypes}:
            return None
        return {
            # asarray, because slicing a plain array is much cheaper than slicing a np.memmap.
            name: np.asarray(np.memmap(directory / name, dtype, mode="r"))
            for name, dtype in dtypes.items()
        }
    except (OSError, UserError):
        return None


def save_arrays(
    directory: Path, dtypes: _DTypes, parts: Iterable[Mapping[str, np.ndarray]]
) -> None:
    """Writes arrays, none of them empty, to a directory that appears whole; replaces a damaged one.

    Each part holds what follows in some of the arrays; one part is in memory at a time. Two
    processes may write the same directory at the same time: one of the two equal results stays.

    Raises:
      OSError: the directory cannot be written; nothing is left behind.
    """
    parts = iter(parts)
    parts = itertools.chain([next(parts)], parts)  # where the first fails, nothing is made
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / name, "wb")) for name in dtypes}
            for part in parts:
                for name, array in part.items():
                    files[name].write(array.astype(dtypes[name], copy=False).tobytes())
        write_json(temporary / _CHECKS, {name: _check(temporary / name) for name in dtypes})
        _publish(temporary, directory, dtypes)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path, dtypes: _DTypes) -> None:
    for attempt in range(_PUBLISH_ATTEMPTS):
        try:
            os.rename(temporary, directory)
            return
        except OSError:
            if load_arrays(directory, dtypes) is not None:
                return
            if attempt == _PUBLISH_ATTEMPTS - 1:
                raise
            # The directory in the way is damaged. A process that maps its files keeps the pages.
            shutil.rmtree(directory, ignore_errors=True)


def _check(path: Path) -> tuple[int, int]:
    """Returns the file's size and CRC-32; a crash can leave the right size with blocks of zeros."""
    size, checksum = 0, 0
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return size, checksum
