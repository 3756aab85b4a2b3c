"""Loading a configuration from a Python file that defines `get_config() -> Config`."""

import difflib
import re
import runpy
import traceback
from pathlib import Path

from olmoe_jax.config.options import FIELDS, Config, check_types
from olmoe_jax.config.schema import nearest
from olmoe_jax.errors import UserError


def load_config(path: str | Path) -> Config:
    """The Config that the Python file `path` defines, with its types checked.

    Ranges are checked by `validate` or `apply_overrides`: what a file leaves open may still
    come from the command line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(_missing_file(path))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failure(path, error)) from error
    if not callable(get_config):
        raise UserError(f"{path}: define get_config() in it, a function that returns a Config")
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: get_config() returned a {type(config).__name__}; it must return a "
            "olmoe_jax.config.Config"
        )
    return check_types(config)


def _missing_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a directory: name one of the config files in it"
    if not path.parent.is_dir():
        return f"{path}: there is no directory {path.parent}"
    present = sorted(file.name for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(path.name, present, n=3, cutoff=0.3)
    hint = f"nearest there: {', '.join(close)}" if close else "no name there is like it"
    return f"{path}: no such file; {hint}"


def _failure(path: Path, error: Exception) -> str:
    """What went wrong in a config file, and on which of its lines."""
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (frames or [None])[-1]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    hint = f"; did you mean {nearest(unknown[1], FIELDS)}?" if unknown else ""
    where = f"{path}:{line}" if line else str(path)
    return f"{where}: {type(error).__name__}: {message}{hint}"
