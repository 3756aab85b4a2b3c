"""The command `python -m olmoe_jax.generate`.

Run this module, and import it nowhere: in Python `olmoe_jax.generate` is the function.
"""

from olmoe_jax.errors import run_command
from olmoe_jax.generation.command import main
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores

if __name__ == "__main__":
    restart_with_huge_pages()
    use_all_cores()
    run_command(main)
