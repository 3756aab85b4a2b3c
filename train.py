"""The main command: python train.py --config configs/densemixer_gsm.py (--help explains)."""

from olmoe_jax.training.__main__ import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
