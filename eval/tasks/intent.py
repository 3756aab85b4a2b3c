"""intent: a sentence's intent and slots as JSON."""

import json
import re
from collections.abc import Sequence
from typing import Any

from eval.statistics import mean_metric
from eval.tasks.esft import EsftTask
from eval.tasks.task import Example, Prediction, Scores, Tools
from olmoe_jax.errors import UserError

_FENCE = re.compile(r"```(?:json|JSON)?")


class Intent(EsftTask):
    name = "intent"
    local_file = "esft/eval/intent.jsonl"
    hub = (("RoxanneWsyw/ESFT-intent:test.jsonl", "train"),)
    max_new_tokens = 128

    def examples(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        examples = super().examples(rows)
        for example in examples:
            expected = parse(example.reference) or {}
            if "intent" not in expected or not isinstance(expected.get("slots"), dict):
                raise UserError(
                    f"intent: the answer of row {example.id} is not JSON with intent and slots"
                )
        return examples

    def answer(self, output: str) -> dict[str, Any] | None:
        """The JSON object on the first line; None when there is none."""
        return parse(output)

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        correct = [float(matches(p.answer, parse(p.example.reference))) for p in predictions]
        return Scores(
            {"exact_match": mean_metric(correct)},
            [{"exact_match": value} for value in correct],
            {"not_json": sum(p.answer is None for p in predictions)},
        )


def parse(text: str) -> dict[str, Any] | None:
    """The JSON object on a text's first line, without code fences and a final 。"""
    lines = _FENCE.sub("", text).strip().splitlines()
    try:
        value = json.loads(lines[0].strip().rstrip("。")) if lines else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def matches(answer: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
    """Whether intent and all slots are the same; lists of slots are compared as sets."""
    if answer is None or not isinstance(answer.get("slots"), dict):
        return False
    slots, wanted = answer["slots"], expected["slots"]
    return (
        answer.get("intent") == expected["intent"]
        and slots.keys() == wanted.keys()
        and all(_normal(slots[name]) == _normal(wanted[name]) for name in wanted)
    )


def _normal(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return sorted({json.dumps(item, sort_keys=True, ensure_ascii=False) for item in value})
