"""The command `python -m olmoe_jax.esft`."""

from olmoe_jax.errors import run_command
from olmoe_jax.methods.esft_command import main

if __name__ == "__main__":
    run_command(main)
