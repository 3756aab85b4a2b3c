"""The base of the four tasks of Expert-Specialized Fine-Tuning (Wang et al. 2024).

A prompt holds solved examples, then the query: "User: EXAMPLE\\n\\n…QUERY\\n\\nAssistant:".
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic

from eval.tasks.task import Example, Task
from olmoe_jax.files import STRICT

_FIRST, _LAST = "User: ", "\n\nAssistant:"


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Query:
    """A row: prompt, right answers, and a number or name."""

    prompt: str
    answers: Annotated[list[str], pydantic.Field(min_length=1)]
    idx: Any = None


class EsftTask(Task):
    """A task whose rows have a prompt and answers, the first of which is the reference."""

    row = Query

    def examples_of(self, rows: Sequence[Query]) -> list[Example]:
        return [
            Example(str(index if row.idx is None else row.idx), row.prompt, row.answers[0])
            for index, row in enumerate(rows)
        ]

    def shorten(self, prompt: str) -> str | None:
        """Returns the prompt without its first solved example; None if the prompt has none."""
        first, _, rest = prompt.removesuffix(_LAST).partition("\n\n")
        if not (rest and first.startswith(_FIRST) and prompt.endswith(_LAST)):
            return None
        return _FIRST + rest + _LAST


def query_of(prompt: str) -> str:
    """Returns the query alone, without the solved examples before it."""
    return prompt.removesuffix(_LAST).rpartition("\n\n")[2].removeprefix(_FIRST)
