"""Runs lm_eval's command line with this project's model added (docs/evaluation.md)."""

import traceback
from collections.abc import Sequence

from eval.harness import NAME
from olmoe_jax.errors import UserError, run_command
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores


def main(arguments: Sequence[str]) -> None:
    """Registers the model and runs lm_eval, which reads `sys.argv` itself.

    Raises:
      UserError: lm_eval is not installed, or refuses what is asked.
    """
    keep_programs()
    try:
        import lm_eval.models  # noqa: F401  registers lm_eval's own models
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(f"needs lm-evaluation-harness ({error}): pip install lm_eval") from None
    # Releases of lm_eval after 0.4.13 find the entry point of the installed package, with the same
    # target. By path: lm_eval's other commands need no jax.
    if NAME not in model_registry:
        model_registry.register(NAME, target="olmoe_jax.lm_eval:OlmoeLM")
    try:
        cli_evaluate()
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))[1:]
        packages = {frame.f_globals["__name__"].partition(".")[0] for frame, _ in frames}
        if {"eval", "olmoe_jax"} & packages:
            raise
        raise UserError(f"lm_eval: {error}") from error


if __name__ == "__main__":
    restart_with_huge_pages()
    use_all_cores()
    run_command(main)
