"""Reading of the rows of a local file or of a data set on the hub."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from olmoe_jax.data.hub import first_line, is_hub_id, is_written_as_path, quiet_hub
from olmoe_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


def is_local(path: str) -> bool:
    """Returns True for a local file, False for `owner/name` or `owner/name:file` on the hub."""
    return is_written_as_path(path) or (":" not in path and path.endswith(SUFFIXES))


def read_rows(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Returns the rows of a .jsonl, .json or .parquet file, or of a data set on the hub.

    A hub data set is `owner/name`, of which `split` is read, or `owner/name:file.jsonl`, which is
    read whole.

    Raises:
      UserError: the rows cannot be read; the message names the file and the line.
    """
    rows = _read_local(path) if is_local(path) else _read_hub(path, split)
    if not rows:
        raise UserError(f"{path} is empty: a data file needs at least one row")
    return rows


def content_digest(path: str, split: str = "train") -> str:
    """Returns a hash of the content that `read_rows` reads; a local file is not parsed."""
    digest = hashlib.sha256()
    if is_local(path):
        digest.update(os.path.splitext(path)[1].encode())
        with _local_file_errors(path), open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        for row in read_rows(path, split):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def row_location(path: str, index: int) -> str:
    """Returns "line N" of row `index` (from 0) of `read_rows(path)`, or "row N" without lines."""
    if is_local(path) and not path.endswith(".parquet") and not _is_json_list(path):
        numbers = (number for number, _ in _lines(path))
        return f"line {next(n for i, n in enumerate(numbers) if i == index)}"
    return f"row {index + 1}"


@contextlib.contextmanager
def _local_file_errors(path: str) -> Iterator[None]:
    """Raises a `UserError` for a file that should not, or cannot, be opened."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory: name a data file in it ({_suffixes()})")
    if not path.endswith(SUFFIXES):
        raise UserError(f"{path} is not a kind of data file that is read: use {_suffixes()}")
    if not os.path.exists(path):
        raise UserError(f"no data file at {path}: check the path")
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _read_local(path: str) -> list[dict[str, Any]]:
    with _local_file_errors(path):
        if path.endswith(".parquet"):
            return _read_parquet(path)
        if _is_json_list(path):
            return _read_json_list(path)
        return [_json_object(path, number, line) for number, line in _lines(path)]


def _read_parquet(path: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from error


def _is_json_list(path: str) -> bool:
    """Returns True if a .json file is one list, False if it has one object per line."""
    if not path.endswith(".json"):
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _read_json_list(path: str) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 text at line {line}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON at line {error.lineno}: {error.msg}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object")
    return rows


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, content) of each line that is not blank, without byte order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if content:
                yield number, content


def _json_object(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text at line {number}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON at line {number}: {error.msg} (column {error.colno})"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not a JSON object")
    return row


def _read_hub(path: str, split: str) -> list[dict[str, Any]]:
    name, _, file = path.partition(":")
    if not is_hub_id(name):
        raise UserError(
            f"no data file at {path}, and it is no hub id: give a {_suffixes()} file, "
            "or a hub id written owner/name or owner/name:file.jsonl"
        )
    with quiet_hub():
        import datasets

        try:
            # The hub's library loads a named file as the only split and calls the split train.
            if file:
                dataset = datasets.load_dataset(name, data_files=file, split="train")
            else:
                dataset = datasets.load_dataset(name, split=split)
        # datasets raises errors of many unrelated types.
        except Exception as error:
            raise UserError(
                f"cannot load {path} from the Hugging Face hub ({first_line(error)}): check the id "
                f"and the network, or give a local {_suffixes()} file"
            ) from error
        return dataset.to_list()
