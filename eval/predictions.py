"""Predictions on disk, appended batch by batch, so that a killed evaluation continues."""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pydantic

from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, check_regular, decode, os_errors, read_bytes


@pydantic.with_config(STRICT)
@dataclass(frozen=True)
class Output:
    """A line of the file: a sample of an example, and whether its prompt was shortened."""

    id: str
    sample: int
    shortened: bool
    output: str


def begun(path: Path) -> bool:
    """Returns whether the file has predictions, or another process is about to write some."""
    if not path.is_file() or path.stat().st_size:
        return path.is_file()
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class PredictionFile:
    """Rows on disk, in whole batches; a context manager that one process at a time can enter.

    Entering cuts off a batch that was not written to its end. Rows that were decoded together are
    then decoded together again, so that a killed evaluation ends with the same file as one that
    was not killed.

    Args:
      path: the file, made if it is missing.
      sizes: rows in each batch.

    Raises:
      UserError: another process writes the file, it is damaged, or it cannot be written.
    """

    def __init__(self, path: Path, sizes: Sequence[int]):
        self._path, self._sizes = path, sizes
        self.rows: list[Output] = []  # on disk
        self.batches = 0  # complete ones

    def __enter__(self) -> "PredictionFile":
        if os.path.lexists(self._path):
            check_regular(self._path)
        try:
            self._file = open(self._path, "a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._path}: another evaluation is writing the file; wait for its end or write "
                "another --output"
            ) from None
        self._cut_to_whole_batches()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: Sequence[Output]) -> None:
        """Writes the next batch, which is on disk on return."""
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        with os_errors(self._path, "write"):
            self._file.write(text.encode(errors="replace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += rows
        self.batches += 1

    def _cut_to_whole_batches(self) -> None:
        *lines, _ = read_bytes(self._path, 1 << 30).split(b"\n")
        try:
            rows = [
                decode(Output, line, f"{self._path}: line {number}")
                for number, line in enumerate(lines, 1)
            ]
        except UserError as error:
            raise UserError(f"{error}; remove the file, and the task is decoded again") from None
        kept = 0
        for size in self._sizes:
            if kept + size > len(rows):
                break
            kept += size
            self.batches += 1
        self.rows = rows[:kept]
        self._file.truncate(sum(len(line) + 1 for line in lines[:kept]))
