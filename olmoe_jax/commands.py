"""All commands under one name: `olmoe-jax COMMAND …`, which `pip install` provides.

`olmoe-jax eval` is `python -m eval.run`, and so on: the modules are the commands.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence

from olmoe_jax.errors import UserError, run_command, shorten
from olmoe_jax.root import ROOT

COMMANDS = {
    "train": ("olmoe_jax.training", "fine-tune a model"),
    "plan": ("olmoe_jax.plan", "say what a run needs, and whether it fits"),
    "data": ("olmoe_jax.data", "show which tokens of a data set train"),
    "esft": ("olmoe_jax.esft", "score experts and select those to tune"),
    "generate": ("olmoe_jax.generate", "let a model answer prompts"),
    "eval": ("eval.run", "evaluate a model on tasks"),
    "lm_eval": ("eval.harness", "run lm-evaluation-harness, with this project's models"),
    "report": ("eval.report", "compare evaluations on one page"),
    "reproduce": ("eval.reproduce", "train and evaluate every cell of the paper's table"),
    "convert from_hf": ("convert.from_hf", "convert a Hugging Face checkpoint"),
    "convert to_hf": ("convert.to_hf", "export a run for transformers or PEFT"),
    "convert merge_lora": ("convert.merge_lora", "merge an adapter into its base"),
    "doctor": ("olmoe_jax.doctor", "say what this machine has, and what is wrong"),
    "quickstart": ("olmoe_jax.quickstart", "train a small model in minutes"),
}
"""Command -> its module and what it does."""


def main(arguments: Sequence[str]) -> None:
    """Runs the module of a command, as `python -m MODULE` would."""
    words = arguments[: 2 if arguments[:1] == ["convert"] else 1]
    name = " ".join(words)
    if name not in COMMANDS:
        if {*words} <= {"convert", "--help", "-h"}:
            print("usage: olmoe-jax COMMAND …      (olmoe-jax COMMAND --help explains)\n")
            print("\n".join(f"  {command:20}{what}" for command, (_, what) in COMMANDS.items()))
            return
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0)[0]
        raise UserError(f"{shorten(name)}: no such command; did you mean olmoe-jax {near}?")
    sys.path.insert(0, str(ROOT))
    # Parsers name the program by this (errors.ArgumentParser).
    sys.argv = [f"olmoe-jax {name}", *arguments[len(words) :]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")


def entry() -> None:
    """The console script."""
    run_command(main)
