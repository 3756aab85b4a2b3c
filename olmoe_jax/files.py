"""Files that others wrote: paths as users spell them, and content decoded into declared types.

Pydantic decodes: its dataclasses state type and range of a field once, its JSON parser refuses deep
nesting and endless integers, and its errors name the field and what stands there. transformers
needs pydantic too, so that it costs no package.
"""

import contextlib
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import pydantic
import pydantic_core

from olmoe_jax.errors import UserError, os_reason, shorten

T = TypeVar("T")

STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
"""Config of dataclasses that declare a file: no conversions, finite numbers, other fields ignored.

    @pydantic.with_config(files.STRICT)
    @dataclasses.dataclass(frozen=True)
    class Scores: ...
"""

SIZE_LIMIT = 64 << 20
"""Bytes of a file that is read whole. The largest sensible one is a tokenizer.json of 35 MB."""
LINE_LIMIT = 8 << 20
"""Bytes of a line of a JSON Lines file."""

Size = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
"""A positive number that an array's dimension can have."""
FileName = Annotated[str, pydantic.Field(pattern=r"^[^/\x00]+$", max_length=255)]
"""The name of a file in the same directory."""


def field_at(*path: str, **limits: Any) -> Any:
    """Returns the `pydantic.Field` of a value that lies deeper in the file, at a path of names."""
    return pydantic.Field(validation_alias=pydantic.AliasPath(*path), **limits)


def expand(path: str) -> str:
    """Returns a path, or a hub id, as a user spells it, with ~ replaced.

    Raises:
      UserError: no file can have this path: it is empty, has a character that no path can have, or
        names an unknown user after ~.
    """
    if not path.strip():
        raise UserError("a path is empty: write a file or directory")
    if re.search("[\0\ud800-\udfff]", path):
        raise UserError(f"{path}: has a character that no path can have; write another")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{path}: there is no user {user[1:]!r}; write the path in full")
    return expanded


def user_path(path: str) -> Path:
    """Returns the path that a user spells; the type of every command line flag that is a path.

    Raises:
      UserError: as for `expand`.
    """
    return Path(expand(path))


def cache_directory(folder: str = "") -> Path:
    """Returns the cache, or a folder in it. The cache is $OLMOE_JAX_CACHE or ~/.cache/olmoe_jax."""
    return user_path(os.environ.get("OLMOE_JAX_CACHE") or "~/.cache/olmoe_jax") / folder


def absolute(path: str) -> str:
    """Returns a path that exists in its absolute form, and another text (a hub id) as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


PATH_OR_ID: dict[str, Any] = {"type": expand, "metavar": "DIR_OR_HUB_ID"}
NEW_DIRECTORY: dict[str, Any] = {
    "required": True,
    "type": user_path,
    "metavar": "DIR",
    "help": "directory to make",
}
BASE: dict[str, Any] = {
    "type": expand,
    "metavar": "DIR",
    "help": "where the base of a LoRA or ESFT run lies now; default: where it lay",
}
"""Arguments of `add_argument` for flags that many commands have."""


@contextlib.contextmanager
def os_errors(path: str | Path, doing: str) -> Iterator[None]:
    """Raises an OSError of the block as a `UserError` that names `path` and what was done there.

    A block needs this only where the OSError names no file or another one: `run_command` reports
    what is left.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: {os_reason(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot {doing} ({os_reason(error)})") from None


def read_bytes(file: Path, limit: int = SIZE_LIMIT) -> bytes:
    """Returns the content of a regular file.

    Raises:
      UserError: the file is missing, no regular file (a FIFO would wait for ever), larger than
        `limit` bytes, or cannot be read.
    """
    with os_errors(file, "read"), open_regular(file) as stream:
        # Not read(limit + 1), which takes memory for `limit` bytes.
        if os.fstat(stream.fileno()).st_size <= limit:
            return stream.read()
    raise UserError(f"{file}: larger than {limit >> 20} MiB, which no such file is; check it")


def open_regular(file: str | Path) -> BinaryIO:
    """Opens a file to read bytes.

    Raises:
      OSError: the file is missing, or cannot be read.
      UserError: the path is a FIFO, a device or a directory.
    """
    check_regular(file)
    return open(file, "rb")


def check_regular(file: str | Path) -> None:
    """Raises the `UserError` of `open_regular`, or the OSError of a missing file."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO or device"
        raise UserError(f"{file}: {kind}, not a file; write a file's path")


def read_text(file: Path, limit: int = SIZE_LIMIT) -> str:
    """Returns the UTF-8 text of a file, without a byte order mark.

    Raises:
      UserError: as for `read_bytes`, or the file is not UTF-8.
    """
    return utf8(read_bytes(file, limit), file)


def utf8(content: bytes, source: str | Path, line: int = 1) -> str:
    """Returns UTF-8 as text, without a byte order mark; `line` is the number of its first line.

    Raises:
      UserError: the content is not UTF-8; the message names `source` and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise UserError(f"{source}: not UTF-8 text at line {line}; save it as UTF-8") from None


def read_json(kind: type[T], file: Path, limit: int = SIZE_LIMIT) -> T:
    """Returns the content of a JSON file as a value of the type `kind`.

    Raises:
      UserError: as for `read_bytes` and `decode`.
    """
    return decode(kind, read_bytes(file, limit), file)


def read_json_lines(kind: type[T], file: Path, torn: bool = False) -> Iterator[T]:
    """Yields the value of each line of a JSON Lines file that is not blank.

    Args:
      kind: the type of a line.
      file: the file.
      torn: leave out a last line without a newline, which a killed process was writing.

    Raises:
      UserError: as for `decode`, with the number of the line; or a line is longer than
        `LINE_LIMIT`.
    """
    for number, line in read_lines(file, torn):
        yield decode(kind, line, f"{file}: line {number}")


def write_json_lines(file: Path, rows: Iterable[Any]) -> None:
    """Writes a JSON Lines file, and the folder that holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(
    file: str | Path, torn: bool = False, opened: Callable[[str | Path], Any] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, stripped content) of each line that is not blank.

    Args:
      file: the file.
      torn: as for `read_json_lines`.
      opened: opens the file; None: `open_regular`.

    Raises:
      UserError: the file cannot be read, or a line is longer than `LINE_LIMIT`.
    """
    with os_errors(file, "read"), (opened or open_regular)(file) as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise UserError(
                    f"{file}: line {number} is longer than {LINE_LIMIT >> 20} MiB; split the row, "
                    "or remove it"
                )
            if torn and not line.endswith(b"\n"):
                return
            content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if content:
                yield number, content


def decode(kind: type[T], content: bytes | str, source: str | Path) -> T:
    """Returns JSON as a value of the type `kind`: a dataclass with `STRICT`, dict[str, int], ….

    Args:
      content: the JSON text, UTF-8.
      source: what the message names: the file, or the file and its line.

    Raises:
      UserError: the content is no JSON, or a field is missing, of another type or out of range. The
        message names the field, what stands there and what could.
    """
    try:
        return _adapter(kind).validate_json(content)
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_first(error)}") from None


def validate(kind: type[T], value: Any, source: str | Path) -> T:
    """Returns a decoded value (dicts and lists) as a value of the type `kind`.

    Raises:
      UserError: as for `decode`.
    """
    # Strict decoding of JSON makes dataclasses of objects; of Python's dicts it would not.
    return decode(kind, pydantic_core.to_json(value, inf_nan_mode="constants"), source)


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    has_config = hasattr(kind, "__pydantic_config__") or hasattr(kind, "model_config")
    return pydantic.TypeAdapter(kind, config=None if has_config else STRICT)


_EXPECTED = {
    "int_type": "be a whole number",
    "float_type": "be a number",
    "string_type": "be text",
    "bool_type": "be true or false",
    "dict_type": "be an object",
    "dataclass_type": "be an object",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "none_required": "be null",
    "string_pattern_mismatch": "be the name of a file in the same directory",
}


def _first(error: pydantic.ValidationError) -> str:
    """Returns the first fault of a value in words."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    kind, message, value = fault["type"], fault["msg"], fault["input"]
    if kind == "json_invalid":
        if len(value.splitlines()) < 2:  # perhaps of a file, whose line the caller names
            message = message.replace(" at line 1 column", " at column")
        return f"not JSON ({message.removeprefix('Invalid JSON: ')})"
    if kind == "missing":
        return f"field {field} is missing"
    if kind == "value_error":
        return f"{field and field + ': '}{message.removeprefix('Value error, ')}"
    expected = _EXPECTED.get(kind) or re.sub(r"^(Input|\w+) should ", "", message)
    return f"{field or 'the content'} is {_show(value)}; it must {expected}"


def _show(value: Any) -> str:
    """Returns a value as JSON, or the kind of a large one."""
    if isinstance(value, dict | list) and len(str(value)) > 40:
        return "an object" if isinstance(value, dict) else "a list"
    return shorten(pydantic_core.to_json(value, inf_nan_mode="constants").decode(), 60)
