"""Evaluation of language models: `python -m eval.run --help`."""
