"""Helpers for loading a tokenizer or a data set from the Hugging Face hub."""

import contextlib
import os
import re
from collections.abc import Iterator

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Returns True if `name` has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def is_written_as_path(name: str) -> bool:
    """Returns True if `name` can only mean a local file or directory."""
    return name.startswith((".", "/")) or os.path.exists(name)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, to quote in a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silences transformers' advice about a missing torch and the hub client's retry log.

    Both are noise here. The project does not depend on torch, and a failed download becomes a
    `UserError`.
    """
    import huggingface_hub.utils.logging as hub_logging

    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    advice, verbosity = os.environ.get(variable), hub_logging.get_verbosity()
    os.environ[variable] = "1"
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if advice is None:
            del os.environ[variable]
        else:
            os.environ[variable] = advice
