"""Predictions on disk, appended batch by batch, so that a killed evaluation continues."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmoe_jax.errors import UserError
from olmoe_jax.files import os_errors


class PredictionFile:
    """Rows on disk, in whole batches; a context manager that one process at a time can enter.

    Entering cuts off a batch that was not written to its end. Rows that were decoded together are
    then decoded together again, so that a killed evaluation ends with the same file as one that
    was not killed.

    Attributes:
      rows: the rows on disk.
      batches: the number of complete batches.

    Args:
      path: the file, made if it is missing.
      sizes: rows in each batch.

    Raises:
      UserError: another process writes the file, or it cannot be written.
    """

    def __init__(self, path: Path, sizes: Sequence[int]):
        self._path, self._sizes = path, sizes
        self.rows: list[dict[str, Any]] = []
        self.batches = 0

    def __enter__(self) -> "PredictionFile":
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

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the next batch, which is on disk on return."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with os_errors(self._path, "write"):
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += rows
        self.batches += 1

    def _cut_to_whole_batches(self) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        kept = 0
        for size in self._sizes:
            if kept + size > len(lines):
                break
            kept += size
            self.batches += 1
        self.rows = [json.loads(line) for line in lines[:kept]]
        self._file.truncate(sum(map(len, lines[:kept])))
