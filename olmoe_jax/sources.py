"""The sources of a run's rows: where each lies, and how often an epoch takes its rows."""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import pydantic

from olmoe_jax import files, hub
from olmoe_jax.errors import UserError

COMPRESSED = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", *COMPRESSED)

_KEYS = ("weight", "config", "split", "name")
_HOW = (
    "write PATH [weight=NUMBER] [config=NAME] [split=NAME] [name=NAME], and commas between sources"
)
_SETTINGS = re.compile(r"(?:(?<!\s)\s+\w+=\S*)*$")


@pydantic.with_config(pydantic.ConfigDict(allow_inf_nan=False))
@dataclass(frozen=True)
class Source:
    """Rows that lie in one place."""

    path: str  # a file, a folder or a pattern; OWNER/NAME or OWNER/NAME:FILE on the hub
    # How many times an epoch takes each row. Of a fraction, an epoch takes so many rows that after
    # several epochs each was taken equally often, or once more.
    weight: Annotated[float, pydantic.Field(gt=0, le=1000)] = 1.0
    config: str | None = None  # of a data set on the hub; None: its only one or its default
    split: str | None = None  # of a data set on the hub, or a slice of it as `train[:10%]`
    # The set of evaluation examples to which the rows belong; None: none of their own.
    name: Annotated[str, pydantic.Field(pattern=r"^[\w.-]{1,64}$")] | None = None

    def __str__(self) -> str:
        """The source as a user writes it."""
        weight = None if self.weight == 1 else str(self.weight).removesuffix(".0")
        settings = {"weight": weight, "config": self.config, "split": self.split, "name": self.name}
        return " ".join([self.path, *(f"{n}={v}" for n, v in settings.items() if v)])

    @property
    def is_local(self) -> bool:
        """Returns whether these are local files."""
        return is_local(self.path)

    @property
    def is_named_split(self) -> bool:
        """Returns whether a configuration and a split of a data set on the hub are read."""
        return not self.is_local and ":" not in self.path


def is_local(path: str) -> bool:
    """Returns True for local files, False for `owner/name` or `owner/name:file` on the hub."""
    if hub.is_written_as_path(path) or glob.has_magic(path):
        return True
    return ":" not in path and path.endswith(SUFFIXES)


def parse(text: str, config: str | None = None, split: str | None = None) -> tuple[Source, ...]:
    """Returns the sources that a text names.

    Args:
      text: `PATH [weight=NUMBER] [config=NAME] [split=NAME] [name=NAME]`, with commas between
        sources. A text that is the path of something that exists is one source.
      config: the configuration of data sets on the hub that name none.
      split: the split of data sets on the hub that name none.

    Raises:
      UserError: a source is not of that form, or has a setting that its path does not read.
    """
    return tuple(
        dataclasses.replace(source, config=source.config or config, split=source.split or split)
        if source.is_named_split
        else source
        for source in map(_parse, _pieces(text))
    )


def reads(sources: Iterable[Source], setting: str) -> bool:
    """Returns whether a source takes the default of `setting`: "config" or "split"."""
    return any(source.is_named_split and not getattr(source, setting) for source in sources)


def expand(text: str) -> str:
    """Returns the text of sources with ~ replaced in each path, after a check of each."""
    return _changed(text, files.expand)


def absolute(text: str) -> str:
    """Returns the text of sources with each path that exists in its absolute form."""
    return _changed(text, files.absolute)


def short(text: str) -> str:
    """Returns the text of sources with only the last part of absolute paths."""
    return _changed(text, lambda path: os.path.basename(path) if path.startswith("/") else path)


def _changed(text: str, change: Callable[[str], str]) -> str:
    changed = (dataclasses.replace(s, path=change(s.path)) for s in map(_parse, _pieces(text)))
    return ", ".join(map(str, changed))


def _exists(path: str) -> bool:
    return os.path.lexists(os.path.expanduser(path))


def _pieces(text: str) -> list[str]:
    files.expand(text)  # no null byte and the like
    return [text] if _exists(text) else [piece.strip() for piece in text.split(",")]


def _parse(text: str) -> Source:
    at = len(text) if _exists(text) else _SETTINGS.search(text).start()
    path, settings = text[:at], {}
    if not path:
        raise UserError(f"{text or 'a source'}: there is no path; {_HOW}")
    for setting in text[at:].split():
        name, _, value = setting.partition("=")
        if name not in _KEYS or not value or name in settings:
            raise UserError(f"{text}: {setting} does not fit; {_HOW}")
        settings[name] = value
    if wrong := re.search(rf"\s({'|'.join(_KEYS)})\s*=", "" if _exists(text) else path):
        raise UserError(f"{text}: {wrong[1]} stands amid a path, or has no value; {_HOW}")
    source = files.validate(Source, {"path": path, **settings}, text)
    if not source.is_named_split:
        for name in settings.keys() & {"config", "split"}:
            raise UserError(
                f"{text}: {name} is only read of a data set OWNER/NAME on the hub; leave it out"
            )
    return source
