"""Stop strings, which end a text."""

from collections.abc import Iterable


def cut_at(text: str, stop: Iterable[str]) -> str:
    """Returns the text before the first of the stop strings."""
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]
