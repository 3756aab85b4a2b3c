"""Checks of the fields of a row."""

from collections.abc import Mapping
from typing import Any

from olmoe_jax.errors import UserError


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
