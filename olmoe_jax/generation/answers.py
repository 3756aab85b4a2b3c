"""What an answer says, and whether it says what was expected: exact match per task.

The evaluation's tasks and the evaluation during training score with the same functions.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

# A minus after a word or a bracket subtracts, it is no sign: 20-5.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d*\.\d+|\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_FENCE = re.compile(r"```(?:json|JSON)?")
NEXT_QUESTION = "Question:"
"""What follows it in a continuation is another word problem."""

Scorer = Literal["gsm", "intent", "text"]


def last_number(text: str) -> str | None:
    """The last number of a text, as it is written but for thousands commas."""
    numbers = _NUMBER.findall(_THOUSANDS.sub("", text))
    return numbers[-1] if numbers else None


def final_number(answer: str) -> str:
    """The number after the last #### of a GSM8K answer, without thousands commas."""
    return _THOUSANDS.sub("", answer.rpartition("####")[2].strip())


def parse_intent(text: str) -> dict[str, Any] | None:
    """The JSON object on a text's first line, without code fences and a final 。"""
    lines = _FENCE.sub("", text).strip().splitlines()
    try:
        value = json.loads(lines[0].strip().rstrip("。")) if lines else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_intent(value: dict[str, Any] | None) -> bool:
    """Whether it has an intent and slots."""
    return value is not None and "intent" in value and isinstance(value.get("slots"), dict)


def intents_match(answer: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
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


def scorer_for(expected: Sequence[str]) -> Scorer:
    """The scorer that answers like these ask for: all must have a ####, or an intent with slots."""
    if all("####" in text for text in expected):
        return "gsm"
    return "intent" if all(is_intent(parse_intent(text)) for text in expected) else "text"


def exact_match(scorer: Scorer, output: str, expected: str) -> bool:
    """Whether a model's continuation says what the expected text says.

    gsm: the last number before a further question; intent: intent and slots; text: the same text,
    but for white space around it.
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
