"""Exact match per task: the answer in a model's text, and its comparison with the expected one.

The tasks of `eval` and the evaluation during training share these functions.
"""

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal

from pydantic_core import from_json

from olmoe_jax.errors import shorten

# A minus after a word or a bracket subtracts and is no sign: 20-5.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d*\.\d+|\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"(-?)[$€£¥] ?(?=[-\d.])")
_FENCE = re.compile(r"```(?:json|JSON)?")
NEXT_QUESTION = "Question:"
"""The beginning of another word problem, at which a continuation is cut."""

Scorer = Literal["gsm", "intent", "text"]


def last_number(text: str) -> str | None:
    """Returns the last number of a text, as written but without thousands commas."""
    numbers = _NUMBER.findall(_THOUSANDS.sub("", text))
    return numbers[-1] if numbers else None


def reference_number(answer: str | float) -> str:
    """Returns the number that a GSM8K answer means, as `last_number` writes it.

    It stands after the last #### of a text, or is the text: 18, $18, 18., 18 dollars, 1,800.

    Raises:
      ValueError: there is no number, or more than one.
    """
    text = f"{Decimal(str(answer)).normalize():f}" if isinstance(answer, float) else str(answer)
    line = text.rpartition("####")[2].strip().partition("\n")[0]
    plain = _GROUPS.sub("", line.replace("\u2212", "-"))
    numbers = _NUMBER.findall(_CURRENCY.sub(r"\1", plain))
    if len(numbers) != 1 or not numbers[0].isascii():
        raise ValueError(f"{shorten(line)!r} is not one number; write e.g. #### 18")
    return numbers[0]


def parse_intent(text: str) -> dict[str, Any] | None:
    """Returns the JSON object on a text's first line, without code fences and a final 。"""
    line = _FENCE.sub("", text).strip().partition("\n")[0]
    try:
        value = from_json(line.strip().rstrip("。"))
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
    """Returns "gsm" if most answers have a ####, "intent" if all are an intent, else "text"."""
    if 2 * sum("####" in text for text in expected) > len(expected):
        return "gsm"
    return "intent" if all(is_intent(parse_intent(text)) for text in expected) else "text"


def exact_match(scorer: Scorer, output: str, expected: str) -> bool:
    """Returns whether a model's continuation says the same as the expected text.

    gsm compares the last number before a further question, intent the intent and slots, text the
    whole text without the white space around it.

    Raises:
      ValueError: gsm's expected text is not one number.
    """
    return _SCORERS[scorer](output, expected)


_SCORERS: dict[str, Callable[[str, str], bool]] = {
    "gsm": lambda output, expected: (
        last_number(output.partition(NEXT_QUESTION)[0]) == reference_number(expected)
    ),
    "intent": lambda output, expected: (
        is_intent(wanted := parse_intent(expected)) and intents_match(parse_intent(output), wanted)
    ),
    "text": lambda output, expected: output.strip() == expected.strip(),
}
