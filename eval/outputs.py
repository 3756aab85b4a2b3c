"""Output directories that keep what was asked, so that a rerun continues only the same work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError, shorten, text_of
from olmoe_jax.files import absolute, read_json

OPTIONAL = 2
"""A file of the same kind lacks at most as many of the names, or has as many more."""


def open_output(
    path: Path,
    file: str,
    asked: Mapping[str, Any],
    free: Sequence[str] = (),
    begun: bool = True,
) -> None:
    """Makes a directory, or makes sure that it was begun with the same values.

    Args:
      path: the directory.
      file: the file in it that keeps the values.
      asked: JSON values by name. A path in them may be spelled differently the next time.
      free: names whose values may differ from the kept ones.
      begun: whether there is work of the kept values; without any, `asked` takes their place.

    Raises:
      UserError: a value differs (named), or the directory is of something else.
    """
    if os.path.lexists(path / file):
        kept = read_json(dict[str, Any], path / file)
        # A file of something else has other names, and is never replaced.
        binding = begun or len(kept.keys() ^ asked.keys()) > OPTIONAL
        for name in dict.fromkeys([*asked, *kept]):
            value = asked.get(name)
            if binding and name not in free and _spelled(kept.get(name)) != _spelled(value):
                former = shorten(text_of(kept.get(name)), 200)
                raise UserError(
                    f"{path} was begun with {name}={former}, now it is {value}; write another "
                    f"--output, or the former {name} to continue"
                )
        if binding:
            return
    elif path.exists() and any(entry.name != f".{file}.partial" for entry in path.iterdir()):
        raise UserError(
            f"--output {path}: holds other files and no {file}; write an empty or new directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    directory.write_json(path / file, dict(asked))


def _spelled(value: Any) -> Any:
    """Returns a JSON value with every path that exists (also --FLAG=PATH) in its absolute form."""
    if isinstance(value, dict):
        return {name: _spelled(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(_spelled, value))
    return "=".join(map(absolute, value.split("="))) if isinstance(value, str) else value
