"""The main command: `python train.py`, `olmoe-jax train` or `python -m olmoe_jax.training`."""

from collections.abc import Sequence

import olmoe_jax
from olmoe_jax.config.load import parse_config
from olmoe_jax.errors import run_command
from olmoe_jax.parallel import distributed
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.parallel.cpu import restart_with_huge_pages


def main(arguments: Sequence[str]) -> None:
    """Trains what the arguments ask for, alone or as one of a run's processes."""
    keep_programs()
    with distributed.joined(arguments) as rest:
        config = parse_config(rest)
        # The name `olmoe_jax.train` imports jax: --help and errors come before.
        olmoe_jax.train(config)


def command() -> None:
    """Runs `main` as a command line program."""
    restart_with_huge_pages()
    run_command(main)


if __name__ == "__main__":
    command()
