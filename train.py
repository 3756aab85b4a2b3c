"""The main command: python train.py --config configs/densemixer_gsm.py (--help explains)."""

from collections.abc import Sequence

import olmoe_jax
from olmoe_jax.command_line import parse_config
from olmoe_jax.errors import run_command


def main(arguments: Sequence[str]) -> None:
    olmoe_jax.train(parse_config(arguments))


if __name__ == "__main__":
    run_command(main)
