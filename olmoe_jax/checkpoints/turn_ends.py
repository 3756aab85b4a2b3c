"""The token ids that end a text, in the files of a Hugging Face directory."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import pydantic

from olmoe_jax.checkpoints.directory import MODEL_FILES, write_json
from olmoe_jax.files import read_json, validate

_FIELD = "eos_token_id"
_NONE = -1
"""The id by which some configurations say that no token ends a text."""
_Id = Annotated[int, pydantic.Field(ge=_NONE, lt=2**31)]


def read_turn_ends(files: Path) -> set[int]:
    """Returns the ids that config.json and generation_config.json name, as far as they exist.

    Raises:
      UserError: a file is damaged, or names what is no id.
    """
    ids: set[int] = set()
    for name in MODEL_FILES:
        if (files / name).is_file():
            ids |= _read(files / name)
    return ids - {_NONE}


def _read(file: Path) -> set[int]:
    """Returns the ids that one file names; {_NONE}: it names none."""
    value = read_json(dict[str, Any], file).get(_FIELD)
    listed = value if isinstance(value, list) else [_NONE if value is None else value]
    return {*validate(list[_Id], listed, f"{file}: {_FIELD}")}


def keep_turn_ends(files: Path, ids: Collection[int]) -> None:
    """Writes a generation_config.json that names these ids alone, as an adapter has it."""
    write_json(files / MODEL_FILES[1], {_FIELD: sorted(ids)})


def write_turn_ends(files: Path, ids: Collection[int]) -> None:
    """Makes the files that exist name these ids; a file that does so already stays as it is.

    Raises:
      UserError: as for `read_turn_ends`.
    """
    for file in (files / name for name in MODEL_FILES):
        if file.is_file() and _read(file) != set(ids):
            value = sorted(ids) if len(ids) > 1 else next(iter(ids))
            write_json(file, read_json(dict[str, Any], file) | {_FIELD: value})
