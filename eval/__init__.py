"""Evaluation of language models on the seven tasks: `python -m eval.run --help`."""
