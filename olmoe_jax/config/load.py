"""Configs from a Python file that defines `get_config()` and from flags; the help of train.py."""

import difflib
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from olmoe_jax.config.fields import nearest, show
from olmoe_jax.config.methods import METHODS, readers
from olmoe_jax.config.options import FIELDS, SECTIONS, Config
from olmoe_jax.config.values import apply_overrides, check_types, unknown_field
from olmoe_jax.errors import UserError, one_line, shorten, text_of
from olmoe_jax.files import read_text, user_path
from olmoe_jax.root import ROOT

_INDENT = " " * 6
EXAMPLE = "--config configs/densemixer_gsm.py"
USAGE = """\
Fine-tunes OLMoE on one data set and writes a Hugging Face checkpoint.

    python train.py --config configs/densemixer_gsm.py [--config.FIELD.SUBFIELD=VALUE ...]

Flags are --name=value or --name value. The config is a Python file that defines get_config(), and
flags set its fields. The same command with the same output directory continues an interrupted run.

Example: two passes with a smaller batch into another directory

    python train.py --config configs/densemixer_gsm.py --config.train.epochs=2 \\
        --config.train.batch_size=64 --config.train.output_dir=runs/short

--preset=published sets what the published runs have otherwise and can be set here
(docs/differences.md): train.loss_normalization=microbatch.

Several processes can share a run (docs/cluster.md). On SLURM, Open MPI and Cloud TPUs they find
each other. Elsewhere each gets --coordinator_address=HOST:PORT --num_processes=N --process_id=I.
The run ends when a process is silent for --heartbeat_timeout=SECONDS (30).

Fields, with their defaults (a config file may set others), types and ranges:
"""


PRESETS = {"published": {"train.loss_normalization": "microbatch"}}
"""{name: fields, which other flags override}."""


def parse_config(arguments: Sequence[str]) -> Config:
    """Returns the validated Config of a command line; `--help` prints the help and exits."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        sys.exit(0)
    flags = dict(_read_flags(arguments))
    path, preset = flags.pop("--config", ""), flags.pop("--preset", None)
    if preset not in (None, *PRESETS):
        raise UserError(f"--preset={preset}: there is {', '.join(PRESETS)}")
    if not path:
        raise UserError(f"--config is missing: write e.g. {EXAMPLE} (--help explains)")
    overrides = {name.removeprefix("--config."): text for name, text in flags.items()}
    return apply_overrides(load_config(path), PRESETS.get(preset, {}) | overrides)


def help_text() -> str:
    """Returns the usage, an example, and every field with its default, type, range and meaning."""
    lines = [USAGE]
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {cls.__doc__}\n")
        for path, field in FIELDS.items():
            if not path.startswith(f"{section}."):
                continue
            accepted = field.type_name
            if field.rule and field.rule.requirement.startswith("must be "):
                accepted += f"; {field.rule.requirement.removeprefix('must be ')}"
            if section == "method":
                accepted += _readers(path.removeprefix("method."))
            declared = f"  --config.{path}={show(field.default)}  ({accepted})"
            lines += _wrap(declared, "")
            lines += _wrap(field.help, _INDENT)
        lines.append("")
    return "\n".join(lines).rstrip()


def _readers(name: str) -> str:
    """Returns the methods that read a field of the section `method`, in words; "": all do."""
    words = []
    for method in readers(name):
        switch = METHODS[method].switches.get(name)
        words.append(f"{method} with {switch}" if switch else method)
    return f"; for {', '.join(words)}" if words else ""


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 98, initial_indent=indent, subsequent_indent=_INDENT, break_on_hyphens=False
    )


def _read_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each flag's (name, value), in order; a later flag of the same name wins."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        _check_flag(name)
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"{name} needs a value: write {name}=VALUE")
        yield name, value


def _check_flag(name: str) -> None:
    if name in ("--config", "--preset") or name.startswith("--config."):
        return
    if not name.startswith("-"):
        raise UserError(f"unexpected argument {name}: flags are --name=value, e.g. {EXAMPLE}")
    # `--train.seed` and `--seed` are like `--config.train.seed` in their last part.
    known = ["config", "help", *(f"config.{path}" for path in FIELDS)]
    raise UserError(f"unknown flag {name}: did you mean --{nearest(name.lstrip('-'), known)}?")


def load_config(path: str | Path) -> Config:
    """Returns the Config that the Python file `path` defines, after a check of its types.

    `apply_overrides` and `validate` check the ranges: the command line may still set a field that
    the file leaves open.

    Raises:
      UserError: the file is missing, fails, or defines no Config.
    """
    path = user_path(str(path))
    if path.parts[:1] == ("configs",) and not path.exists():
        path = ROOT / path  # the project's own, from any directory
    if not path.exists():
        raise UserError(_missing_file(path))
    read_text(path)  # nothing that is no text runs
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except BaseException as error:  # SystemExit too, which would end the command with success
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
    if not path.parent.is_dir():
        return f"{path}: there is no directory {path.parent}"
    present = sorted(file.name for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(path.name, present, n=3, cutoff=0.3)
    hint = f"nearest there: {', '.join(close)}" if close else "no name there is like it"
    return f"{path}: no such file; {hint}"


def _failure(path: Path, error: BaseException) -> str:
    """Returns what went wrong in a config file, and on which of its lines."""
    text = shorten(one_line(text_of(error)), 300)
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
    ]
    line = frames[-1] if frames else None
    if isinstance(error, SyntaxError):
        line, message = error.lineno, f"SyntaxError: {error.msg}"
    elif unknown := re.search(r"(\w+)\.__init__\(\) got .* keyword argument '(\w+)'", text):
        section = next((name for name, cls in SECTIONS.items() if cls.__name__ == unknown[1]), None)
        message = str(unknown_field(f"{section}.{unknown[2]}")) if section else message
    return f"{path}:{line}: {message}" if line else f"{path}: {message}"
