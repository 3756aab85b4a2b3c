"""Reading of the rows of local files or of a data set on the hub, one at a time."""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from olmoe_jax import hub
from olmoe_jax.data.fields import naming_options
from olmoe_jax.data.hub_dataset import load_from_hub
from olmoe_jax.errors import UserError, first_line
from olmoe_jax.files import (
    LINE_LIMIT,
    check_regular,
    decode,
    open_regular,
    os_errors,
    read_lines,
)
from olmoe_jax.sources import COMPRESSED, SUFFIXES, Source, is_local

if TYPE_CHECKING:
    import pyarrow

_SUFFIXES = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

_LIMIT = f"{LINE_LIMIT >> 20} MiB"

Row = dict[str, Any]

# A table is decoded in batches of a few rows, because each may hold 8 MiB of text.
_BATCH_ROWS = 16
# A page of a Parquet file is decoded in one piece. The common writers end a page after 1024 rows,
# whatever the size of the rows.
_PAGE_ROWS = 1024
_PAGE_LIMIT = 256 << 20


def read_source(source: Source) -> Iterator[tuple[str, Row]]:
    """Yields `read_rows` of a source: each row once, whatever the source's weight."""
    with naming_options():
        yield from read_rows(source.path, source.split or "train", source.config)


def read_rows(
    path: str, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of files (see `_local_files`), or of a data set on the hub.

    The place names file and line or row, for messages. A row takes at most 8 MiB, so that any file
    is read in little memory. A hub data set is `owner/name`, of which `split` of the configuration
    `config` is read, or `owner/name:file.jsonl`, which is read whole.

    Raises:
      UserError: the rows cannot be read; the message names the place.
    """
    for file in _local_files(path) if is_local(path) else [path]:
        place = None
        for place, row in _local_rows(file) if is_local(path) else _hub_rows(path, split, config):
            yield f"{file}: {place}", row
        if place is None:
            name = file if is_local(path) else Source(path, config=config, split=split)
            raise UserError(f"{name} is empty: a data file needs at least one row")


def content_digest(source: Source) -> str:
    """Returns a hash of the content that `read_source` reads; a local file is not parsed."""
    digest = hashlib.sha256()
    if source.is_local:
        for name in _local_files(source.path):
            digest.update(os.path.splitext(name)[1].encode())
            with os_errors(name, "read"), open_regular(name) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    else:
        for _, row in read_source(source):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def check_distinct(sources: Sequence[Source]) -> None:
    """Raises a `UserError` if a file, or a split of a data set on the hub, is in two sources."""
    seen: dict[object, Source] = {}
    for source in sources:
        for place in _places(source):
            if other := seen.get(place):
                name = place if source.is_local else source.path
                raise UserError(
                    f"{name} is in two sources, {other} and {source}; name it once, with weight=2 "
                    "if an epoch is to take its rows twice"
                )
            seen[place] = source


def in_both(some: Iterable[Source], others: Iterable[Source]) -> list[str]:
    """Returns the files, and the splits of data sets on the hub, of some sources and of others."""
    places = {place for source in some for place in _places(source)}
    return [
        str(place if source.is_local else source)
        for source in others
        for place in _places(source)
        if place in places
    ]


def _places(source: Source) -> list[object]:
    """Returns the files of a source, or the split of a data set on the hub."""
    if source.is_local:
        return [os.path.realpath(file) for file in _local_files(source.path)]
    return [(source.path, source.config, source.split or "train")]


def about_rows(sources: Sequence[Source]) -> int | None:
    """Returns how many lines the files of sources have; None where rows are no lines."""
    lines = 0
    for source in sources:
        files = _local_files(source.path) if source.is_local else [""]
        for file in files:
            if not file.endswith((".jsonl", ".csv", *COMPRESSED)):
                return None
            with _opened(file) as stream:
                while block := stream.read(1 << 20):
                    lines += block.count(b"\n")
    return lines


def _local_files(path: str) -> list[str]:
    """Returns a data file, or the data files of a folder or of a pattern with *, ? or [, sorted.

    ** in a pattern stands for any folders. Hidden files are left out.
    """
    if os.path.isdir(path):
        names = (name for name in os.listdir(path) if not name.startswith("."))
        files = sorted(os.path.join(path, name) for name in names)
        # Their .json files are no rows.
        if any(file.endswith((".arrow", "/dataset_dict.json")) for file in files):
            raise UserError(
                f"{path} is what save_to_disk of `datasets` wrote: write the data set with to_json "
                "or to_parquet, and name that file"
            )
        found = [file for file in files if file.endswith(SUFFIXES)]
        if not found:
            raise UserError(f"{path} is a directory: name a data file in it ({_SUFFIXES})")
        return found
    found = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True)) or [path]
    for file in found:
        if not file.endswith(SUFFIXES):
            raise UserError(f"{file} is not a kind of data file that is read: use {_SUFFIXES}")
    return found


def _local_rows(path: str) -> Iterator[tuple[str, Row]]:
    with os_errors(path, "read"), open_regular(path) as file:
        begin = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.endswith(".csv"):
        yield from _csv_rows(path)
    elif path.endswith(".json") and begin == b"[":
        yield from _list_rows(path)
    else:
        for number, line in read_lines(path, opened=_opened):
            yield f"line {number}", row_of_line(line, f"{path}: line {number}")


def row_of_line(line: bytes, place: str) -> Row:
    """Returns the row of a line of JSON; `place` names the line in messages.

    Raises:
      UserError: the line is no JSON object; the message says what to write instead.
    """
    try:
        return decode(Row, line, place)
    except UserError as error:
        raise UserError(f"{error}{_instead(line)}") from None


def _instead(line: bytes) -> str:
    """Returns what to write instead of a line that is no row, for the end of a message."""
    try:
        line.decode()
    except UnicodeDecodeError:  # PowerShell writes UTF-16, older programs cp1252
        return "; save the file as UTF-8"
    is_whole = line.startswith(b"{") and line.endswith(b"}")
    return "" if is_whole else "; write one JSON object a line, or a .json file that lists them"


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """Opens a file to read its bytes, decompressed."""
    kind = next((k for suffix, k in COMPRESSED.items() if str(path).endswith(suffix)), None)
    if kind is None:
        with open_regular(path) as stream:
            yield stream
        return
    import pyarrow

    check_regular(path)
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=kind)) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path} is no {kind} file that is whole: {first_line(error)}") from None


def _csv_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a table with a header, in which every field is text."""
    csv.field_size_limit(LINE_LIMIT)
    with open_regular(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(header) == 1 and re.search(r"\w[;\t]\w", header[0]):
                raise UserError(
                    f"{path}: the header is one column, {header[0]}; separate columns with commas"
                )
            for name, count in Counter(header).items():
                if not name or count > 1:
                    raise UserError(
                        f"{path}: the header has "
                        + (f"{name} twice" if name else "a column without a name")
                        + "; name each column once, and leave a table's index out"
                    )
            for values in reader:
                if not values:
                    continue
                where = f"line {reader.line_num}"
                if len(values) != len(header):
                    raise UserError(
                        f"{path}: {where} has {len(values)} fields, and the header {len(header)}"
                    )
                yield where, dict(zip(header, values, strict=True))
        except UnicodeDecodeError:
            line = reader.line_num
            raise UserError(f"{path}: after line {line}: not UTF-8; save it as UTF-8") from None
        except csv.Error as error:
            reason = first_line(error)
            raise UserError(f"{path}: not CSV after line {reader.line_num} ({reason})") from None


_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""The character that `surrogateescape` makes of a byte that is not UTF-8."""


def _list_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a file that is one JSON list; a few rows are in memory at a time."""
    decode_at = json.JSONDecoder().raw_decode
    with (
        open_regular(path) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as file,
    ):
        text, number = file.read(3 * LINE_LIMIT), 0
        at = text.index("[") + 1
        more = not text.startswith("]", _SPACE.match(text, at).end())
        while more:
            number += 1
            where = f"{path}: row {number}"
            # Without more to add, each of the last rows would copy all that follow it.
            if len(text) - at < 2 * LINE_LIMIT and (next_part := file.read(2 * LINE_LIMIT)):
                text, at = text[at:] + next_part, 0
            at = _SPACE.match(text, at).end()
            try:
                row, end = decode_at(text, at)
            # Integers of more than 4,300 digits and deep nesting are among the errors.
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", first_line(error).partition(";")[0])
                raise UserError(f"{where} is not JSON of at most {_LIMIT} ({reason})") from None
            if end - at > LINE_LIMIT:
                raise UserError(f"{where} is longer than {_LIMIT}; split the row, or remove it")
            if _NOT_UTF8.search(text, at, end):
                raise UserError(f"{where} is not UTF-8 text; save the file as UTF-8")
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object")
            yield f"row {number}", row
            end = _SPACE.match(text, end).end()
            more, at = text.startswith(",", end), end + 1
        ended = not number or text.startswith("]", at - 1)
        if not ended or (number and (text[at:] + file.read(1 << 16)).strip()):
            raise UserError(f"{path}: not JSON after row {number}")


def _parquet_rows(path: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            row_size = about.total_byte_size // max(about.num_rows, 1)
            if row_size * min(about.num_rows, _PAGE_ROWS) > _PAGE_LIMIT:
                raise UserError(
                    f"{path}: row {first} and the next have {row_size >> 20} MiB each on average, "
                    "in pages too large to read; write the file with a smaller row group size"
                )
            batch_rows = 1 if row_size * _BATCH_ROWS > LINE_LIMIT else _BATCH_ROWS
            for batch in file.iter_batches(batch_rows, [group]):
                yield from _table_rows(path, batch, first)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from None


def _table_rows(
    path: str, table: "pyarrow.RecordBatch | pyarrow.Table", first: int
) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a part of a table, of which row `first` of the file is the first."""
    import pyarrow

    # A dictionary holds the values of many more rows.
    columns = [c for c in table.columns if not pyarrow.types.is_dictionary(c.type)]
    try:
        if sum(column.nbytes for column in columns) > LINE_LIMIT:
            raise OverflowError(f"longer than {_LIMIT}")
        rows = [{name: _without_nulls(v) for name, v in r.items()} for r in table.to_pylist()]
    # Text that is not UTF-8; dates and time zones that Python does not have.
    except (pyarrow.ArrowException, OverflowError, ValueError, LookupError) as error:
        if table.num_rows == 1:
            reason = first_line(error)
            raise UserError(f"{path}: row {first} cannot be read ({reason}); correct it") from None
        for index in range(table.num_rows):
            yield from _table_rows(path, table.slice(index, 1), first + index)
    else:
        yield from ((f"row {first + index}", row) for index, row in enumerate(rows))


def _without_nulls(value: Any) -> Any:
    """Returns a cell without the null fields of its structs.

    A table gives every struct of a column the fields of all rows: the arguments of every tool, say.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _hub_rows(path: str, split: str, config: str | None) -> Iterator[tuple[str, Row]]:
    if not hub.is_hub_id(path.partition(":")[0]) or path.endswith(":"):
        raise UserError(
            f"no data file at {path}, and it is no hub id: give a {_SUFFIXES} file, "
            "or a hub id written owner/name or owner/name:file.jsonl"
        )
    dataset, first = load_from_hub(path, split, config), 1
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        yield from _table_rows(path, table, first)
        first += table.num_rows
