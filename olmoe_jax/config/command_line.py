"""The command line of train.py: `--config FILE` and `--config.FIELD.SUBFIELD=VALUE` over it."""

import sys
import textwrap
from collections.abc import Iterator, Sequence

from olmoe_jax.config.file import load_config
from olmoe_jax.config.options import FIELDS, SECTIONS, Config, apply_overrides
from olmoe_jax.config.schema import nearest, show
from olmoe_jax.errors import UserError

USAGE = """\
Fine-tunes OLMoE on one data set and writes a Hugging Face checkpoint.

    python train.py --config configs/densemixer_gsm.py [--config.FIELD.SUBFIELD=VALUE ...]

Flags are --name=value or --name value. The config is a Python file that defines get_config();
any field of it can be set on the command line. The same command in the same output directory
continues an interrupted run.

Example: two passes with a smaller batch, somewhere else

    python train.py --config configs/densemixer_gsm.py --config.train.epochs=2 \\
        --config.train.batch_size=64 --config.train.output_dir=runs/short

Several processes as one run (docs/cluster.md): SLURM, Open MPI and Cloud TPUs are recognised;
otherwise each gets --coordinator_address=HOST:PORT --num_processes=N --process_id=I, and if
wanted --heartbeat_timeout=SECONDS (30) after which a silent process ends all.

Fields, with their defaults (a config file may set others):
"""
EXAMPLE = "--config configs/densemixer_gsm.py"


def parse_config(arguments: Sequence[str]) -> Config:
    """The validated Config that the arguments ask for; `--help` prints the help and exits."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        sys.exit(0)
    flags = dict(_read_flags(arguments))
    path = flags.pop("--config", "")
    if not path:
        raise UserError(f"--config is missing: write e.g. {EXAMPLE} (--help explains)")
    return apply_overrides(
        load_config(path), {name.removeprefix("--config."): text for name, text in flags.items()}
    )


def help_text() -> str:
    """Usage, an example, and every field with its type, default and description."""
    lines = [USAGE]
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {cls.__doc__}\n")
        for path, entry in FIELDS.items():
            if path.startswith(f"{section}."):
                declared = f"  --config.{path}={show(entry.default)}  ({entry.type_name})"
                lines += textwrap.wrap(declared, 100, subsequent_indent=" " * 6)
                lines += textwrap.wrap(
                    entry.help, 96, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
        lines.append("")
    return "\n".join(lines).rstrip()


def _read_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each flag, in order; a later one of the same name wins."""
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
    if name == "--config" or name.startswith("--config."):
        return
    if not name.startswith("-"):
        raise UserError(f"unexpected argument {name}: flags are --name=value, e.g. {EXAMPLE}")
    # `--train.seed` and `--seed` are like `--config.train.seed` in their last part.
    known = ["config", "help", *(f"config.{path}" for path in FIELDS)]
    raise UserError(f"unknown flag {name}: did you mean --{nearest(name.lstrip('-'), known)}?")
