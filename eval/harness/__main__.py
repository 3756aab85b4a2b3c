"""Runs lm_eval's command line with this project's model added (docs/evaluation.md)."""

from collections.abc import Sequence

from eval.harness import NAME
from olmoe_jax.errors import UserError, run_command
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores


def main(arguments: Sequence[str]) -> None:
    """Registers the model and runs lm_eval, which reads `sys.argv` itself.

    Raises:
      UserError: lm_eval is not installed.
    """
    keep_programs()
    try:
        import lm_eval.models  # noqa: F401  registers lm_eval's own models
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(f"needs lm-evaluation-harness ({error}): pip install lm_eval") from None
    # By path: lm_eval's other commands need no jax.
    model_registry.register(NAME, target="eval.harness.model:OlmoeLM")
    cli_evaluate()


if __name__ == "__main__":
    restart_with_huge_pages()
    use_all_cores()
    run_command(main)
