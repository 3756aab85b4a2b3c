"""The task gsm: grade school word problems (Cobbe et al. 2021); the last number answers."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import pydantic

from eval.tasks.task import Example, Prediction, Scores, Task, Tools, exact_match
from olmoe_jax.files import STRICT
from olmoe_jax.generation.answers import NEXT_QUESTION, last_number, reference_number


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Problem:
    """A row: the answer is a number, or a text that ends in one after ####."""

    question: str
    answer: Annotated[str | int | float, pydantic.AfterValidator(reference_number)]


class Gsm(Task):
    """GSM8K without examples in the prompt."""

    name = "gsm"
    local_file = "gsm8k/test.jsonl"
    hub = (("RoxanneWsyw/gsm:test.jsonl", "train"),)
    row = Problem
    stop = (NEXT_QUESTION,)

    def examples_of(self, rows: Sequence[Problem]) -> list[Example]:
        return [
            Example(
                str(index),
                f"Answer the following question.\n\nQuestion: {row.question.strip()}\nAnswer:",
                row.answer,
            )
            for index, row in enumerate(rows)
        ]

    def answer(self, output: str) -> str | None:
        """Returns the last number of the text, as written but without thousands commas."""
        return last_number(output)

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        return exact_match(
            (p.answer == p.example.reference for p in predictions),
            no_number=sum(p.answer is None for p in predictions),
        )
