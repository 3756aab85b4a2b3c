"""Directories of arrays, each either whole or absent."""

import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_META = "meta.json"
_PUBLISH_ATTEMPTS = 3


def load_arrays(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the memory-mapped arrays and the information that `save_arrays` wrote.

    Returns None if the directory is absent, or one of its files is missing, truncated or altered.
    """
    try:
        meta = json.loads((directory / _META).read_text())
        for name, check in meta["files"].items():
            if _file_check(directory / name) != check:
                return None
        arrays = {
            # asarray, because slicing a plain array is much cheaper than slicing a np.memmap.
            Path(name).stem: np.asarray(np.load(directory / name, mmap_mode="r"))
            for name in meta["files"]
        }
        return arrays, meta["info"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_arrays(directory: Path, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Writes arrays and JSON information to `directory` all at once; replaces a damaged one.

    Two processes may write the same directory at the same time: one of the two equal results stays.

    Raises:
      OSError: the directory cannot be written; nothing is left behind.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        files = {f"{name}.npy": _file_check(temporary / f"{name}.npy") for name in arrays}
        (temporary / _META).write_text(json.dumps({"files": files, "info": info}))
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, directory: Path) -> None:
    for attempt in range(_PUBLISH_ATTEMPTS):
        try:
            os.rename(temporary, directory)
            return
        except OSError:
            if load_arrays(directory) is not None:
                return
            if attempt == _PUBLISH_ATTEMPTS - 1:
                raise
            # The directory in the way is damaged. A process that maps its files keeps the pages.
            shutil.rmtree(directory, ignore_errors=True)


def _file_check(path: Path) -> list[int]:
    """Returns the file's size and CRC-32; a crash can leave the right size with blocks of zeros."""
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
