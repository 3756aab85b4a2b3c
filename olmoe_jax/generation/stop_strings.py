"""Stop strings, which end a text."""

from collections.abc import Iterable


def cut_at(text: str, stop: Iterable[str]) -> str:
    """Returns the text before the first of the stop strings."""
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]


def settled(text: str, stop: Iterable[str]) -> str:
    """Returns the text without an end that more tokens may change.

    That is a part of a character, or the beginning of a stop string.
    """
    text = text.rstrip("\ufffd")
    begins = (s[:length] for s in stop for length in range(1, len(s)))
    return text[: len(text) - max((len(b) for b in begins if text.endswith(b)), default=0)]
