"""The task intent: a sentence's intent and slots as JSON."""

from collections.abc import Sequence
from typing import Any

from eval.tasks.esft import EsftTask, Query
from eval.tasks.task import Example, Prediction, Scores, Tools, exact_match
from olmoe_jax.errors import UserError
from olmoe_jax.generation.answers import intents_match, is_intent, parse_intent


class Intent(EsftTask):
    """Intent recognition: the intent and all slots must match."""

    name = "intent"
    local_file = "esft/eval/intent.jsonl"
    hub = (("RoxanneWsyw/ESFT-intent:test.jsonl", "train"),)
    max_new_tokens = 128

    def examples_of(self, rows: Sequence[Query]) -> list[Example]:
        examples = super().examples_of(rows)
        for example in examples:
            if not is_intent(parse_intent(example.reference)):
                raise UserError(
                    f"intent: the answer of row {example.id} is not JSON with intent and slots"
                )
        return examples

    def answer(self, output: str) -> dict[str, Any] | None:
        """Returns the JSON object on the first line; None if there is none."""
        return parse_intent(output)

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        return exact_match(
            (intents_match(p.answer, parse_intent(p.example.reference)) for p in predictions),
            not_json=sum(p.answer is None for p in predictions),
        )
