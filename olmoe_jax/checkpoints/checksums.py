"""Checksums of a directory's files: checksums.json lists them, so that damage to a file shows.

XXH3 finds damage by accident and is as fast as memory; it is no protection against forgery.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pydantic
import xxhash

from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, open_regular, read_json

FILE = "checksums.json"

_PIECE = 64 << 20
"""The bytes of a file that one thread hashes at a time."""
_BLOCK = 1 << 18
_PAUSE = 0.2
"""Seconds between two looks at a directory that is being written."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _Listed:
    """The content of FILE: {path below the directory: the checksums that the file may have}."""

    xxh3_128: dict[str, list[str]]


def write(path: Path, pattern: str = "*", leave_out: Collection[str] = ()) -> None:
    """Lists the files below a directory that is complete.

    Args:
      path: the directory.
      pattern: only files whose name matches it are listed.
      leave_out: files not to list, by their path below the directory.
    """
    names = sorted(
        name
        for file in path.rglob(pattern)
        if file.is_file() and (name := str(file.relative_to(path))) not in leave_out
    )
    _write(path, {name: [checksum] for name, checksum in _checksums(path, names).items()})


class HashAhead:
    """Hashes the files of a directory that is being written as they become complete.

    `write` then finds most of the work done: what it adds to a save is the last files' time.
    """

    def __init__(self, path: Path):
        self.path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._run, name="olmoe_jax-checksums", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Returns when the thread has ended."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE):
            with contextlib.suppress(OSError):  # renamed meanwhile: the next look finds it
                for file in self.path.rglob("*"):
                    # Tensorstore gives a file that is not complete another name.
                    complete = file.suffix != ".__lock" and file.is_file()
                    if complete and not self._ended.is_set():
                        _checksums(self.path, [str(file.relative_to(self.path))])


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file, and lists it beside it. A kill at any moment leaves a file that is valid.

    The file may have the content that it had before, until it is replaced.
    """
    path, partial = file.parent, directory.partial_json(file, value)
    listed = _read(path) if (path / FILE).exists() else {}
    (checksum,) = _checksums(path, [partial.name]).values()
    _write(path, listed | {file.name: [*listed.get(file.name, []), checksum]})
    partial.replace(file)


def check_weights(path: Path) -> None:
    """Checks the weights of an export of this project; of other directories, nothing.

    Raises:
      UserError: a file is damaged or missing.
    """
    if (path / FILE).exists():
        check(path, f"export it again; if you changed the file, remove {FILE} beside it")


def check(path: Path, advice: str) -> None:
    """Checks all files that a directory lists.

    Raises:
      UserError: a file is damaged or missing; the message ends with the advice.
    """
    if reason := damage(path):
        raise UserError(f"{reason}; {advice}")


def damage(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, share: slice = slice(None)
) -> str | None:
    """Returns what is wrong with the files of a directory; None: they are what was written.

    Args:
      path: the directory.
      wanted: returns whether to check a file, by its path below the directory.
      share: which of these files to check.

    Raises:
      OSError: a file is there and cannot be read.
    """
    try:
        listed = _read(path)
        names = sorted(filter(wanted, listed))[share]
        # What is not listed has no influence, but for a FIFO: its reader would wait for ever.
        for file in path.iterdir():
            if not (file.is_file() or file.is_dir()):
                return f"{file}: neither a file nor a directory"
        for name, checksum in _checksums(path, names).items():
            if checksum not in listed[name]:
                return f"{path / name}: damaged, its checksum differs"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{error.filename}: no such file"
    except UserError as error:
        return str(error)
    return None


def _read(path: Path) -> dict[str, list[str]]:
    return read_json(_Listed, path / FILE).xxh3_128


def _write(path: Path, listed: Mapping[str, list[str]]) -> None:
    directory.write_json(path / FILE, {"xxh3_128": listed})


def _checksums(path: Path, names: Collection[str]) -> dict[str, str]:
    """Returns {name: checksum} of files below a directory, hashed in threads.

    A file's checksum is that of its pieces' checksums.
    """
    files = {name: _stamp(path / name) for name in names}
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pieces = {
            name: [
                pool.submit(_hash_piece, stamp, offset, path / name)
                for offset in range(0, stamp[0] or 1, _PIECE)
            ]
            for name, stamp in files.items()
        }
        return {
            name: xxhash.xxh3_128(b"".join(piece.result() for piece in found)).hexdigest()
            for name, found in pieces.items()
        }


_Stamp = tuple[int, ...]
"""A file's size and state, which changes when it is written: a process hashes each state once."""


def _stamp(file: Path) -> _Stamp:
    with open_regular(file) as stream:
        s = os.fstat(stream.fileno())
    return s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns


_hashed: dict[tuple[_Stamp, int], bytes] = {}


def _hash_piece(stamp: _Stamp, offset: int, file: Path) -> bytes:
    """Returns the checksum of a file's bytes from `offset`, at most _PIECE of them."""
    if (stamp, offset) not in _hashed:
        digest, block, left = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK)), _PIECE
        with open_regular(file) as stream:
            stream.seek(offset)
            while left and (count := stream.readinto(block)):
                digest.update(block[:count])
                left -= count
        _hashed[stamp, offset] = digest.digest()
    return _hashed[stamp, offset]
