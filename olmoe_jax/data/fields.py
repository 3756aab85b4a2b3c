"""Checks of the fields of a row."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from olmoe_jax.errors import UserError


class AvoidableError(UserError):
    """An error that an option of training avoids.

    Only training, and the commands that show or score its rows, have the option: `naming_options`
    adds its name, `option`, to the message.
    """

    def __init__(self, message: str, option: str):
        super().__init__(message)
        self.option = option


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """Adds the option to the message of an `AvoidableError` of the block."""
    try:
        yield
    except AvoidableError as error:
        raise UserError(f"{error}{error.option}") from None


def checked_text(value: Any, field: str) -> str:
    """Returns `value` if it is text that has a UTF-8 form, or raises a `UserError`."""
    if not isinstance(value, str):
        raise UserError(f"field {field} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise UserError(f"field {field} is not valid Unicode: {error.reason}") from error
    return value


def has_content(value: Any) -> bool:
    """Returns whether a field says something: it is not null, nor empty."""
    return value is not None and (not isinstance(value, str | list | Mapping) or len(value) > 0)
