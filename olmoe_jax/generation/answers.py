"""Exact match per task: the answer in a model's text, and its comparison with the expected one.

The tasks of `eval` and the evaluation during training share these functions.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic_core import from_json

# A minus after a word or a bracket subtracts and is no sign: 20-5.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d*\.\d+|\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_FENCE = re.compile(r"```(?:json|JSON)?")
NEXT_QUESTION = "Question:"
"""The beginning of another word problem, at which a continuation is cut."""

Scorer = Literal["gsm", "intent", "text"]


def last_number(text: str) -> str | None:
    """Returns the last number of a text, as written but without thousands commas."""
    numbers = _NUMBER.findall(_THOUSANDS.sub("", text))
    return numbers[-1] if numbers else None


def final_number(answer: str) -> str:
    """Returns the number after the last #### of a GSM8K answer, without thousands commas."""
    return _THOUSANDS.sub("", answer.rpartition("####")[2].strip())


def parse_intent(text: str) -> dict[str, Any] | None:
    """Returns the JSON object on a text's first line, without code fences and a final 。"""
    lines = _FENCE.sub("", text).strip().splitlines()
    try:
        value = from_json(lines[0].strip().rstrip("。")) if lines else None
    except ValueError:  # no JSON, or nested more than 200 deep
        return None
    return value if isinstance(value, dict) else None


def is_intent(value: dict[str, Any] | None) -> bool:
    """Returns whether a parsed answer has an intent and slots."""
    return value is not None and "intent" in value and isinstance(value.get("slots"), dict)


def intents_match(answer: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
    """Returns whether intent and all slots are the same; lists of slots are compared as sets."""
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


def scorer_for(expected: Sequence[str]) -> Scorer:
    """Returns "gsm" if all answers have a ####, "intent" if all are an intent, else "text"."""
    if all("####" in text for text in expected):
        return "gsm"
    return "intent" if all(is_intent(parse_intent(text)) for text in expected) else "text"


def exact_match(scorer: Scorer, output: str, expected: str) -> bool:
    """Returns whether a model's continuation says the same as the expected text.

    gsm compares the last number before a further question, intent the intent and slots, text the
    whole text without the white space around it.
    """
    return _SCORERS[scorer](output, expected)


_SCORERS: dict[str, Callable[[str, str], bool]] = {
    "gsm": lambda output, expected: (
        last_number(output.partition(NEXT_QUESTION)[0]) == final_number(expected)
    ),
    "intent": lambda output, expected: (
        is_intent(wanted := parse_intent(expected)) and intents_match(parse_intent(output), wanted)
    ),
    "text": lambda output, expected: output.strip() == expected.strip(),
}
