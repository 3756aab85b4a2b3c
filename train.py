"""The main command: python train.py --config configs/densemixer_gsm.py (--help explains)."""

from collections.abc import Sequence

import olmoe_jax
from olmoe_jax.config.command_line import parse_config
from olmoe_jax.errors import run_command
from olmoe_jax.parallel import distributed
from olmoe_jax.parallel.cpu import restart_with_huge_pages


def main(arguments: Sequence[str]) -> None:
    with distributed.joined(arguments) as rest:
        olmoe_jax.train(parse_config(rest))


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
