"""Runs lm-evaluation-harness on this project's models: `python -m eval.harness --help`.

lm_eval's command line, cache and result files do the work; `eval.report` reads the results.
"""

NAME = "olmoe_jax"
"""The model's name in lm_eval: --model olmoe_jax."""
