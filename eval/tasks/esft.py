"""The base of the four tasks of Expert-Specialized Fine-Tuning (Wang et al. 2024).

A prompt holds solved examples, then the query: "User: EXAMPLE\\n\\n…QUERY\\n\\nAssistant:".
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import pydantic

from eval.tasks.task import Example, Task
from olmoe_jax.data.reading import Row
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

    def examples(self, rows: Iterable[tuple[str, Row]]) -> list[Example]:
        """Returns the examples of rows with answers, or with a completion as the hub's rows."""
        return super().examples((place, _with_answers(row)) for place, row in rows)

    def examples_of(self, rows: Sequence[Query]) -> list[Example]:
        ids = [str(index if row.idx is None else row.idx) for index, row in enumerate(rows)]
        if len(set(ids)) < len(ids):  # numbers of several files, one after the other
            ids = [str(index) for index in range(len(rows))]
        return [
            Example(name, row.prompt, row.answers[0].strip())
            for name, row in zip(ids, rows, strict=True)
        ]

    def shorten(self, prompt: str) -> str | None:
        """Returns the prompt without its first solved example; None if the prompt has none."""
        first, _, rest = prompt.removesuffix(_LAST).partition("\n\n")
        if not (rest and first.startswith(_FIRST) and prompt.endswith(_LAST)):
            return None
        return _FIRST + rest + _LAST


def _with_answers(row: Row) -> Row:
    """Returns the row with its answer in a list. The hub fills missing columns with null."""
    found = [row[name] for name in ("answers", "answer", "completion") if row.get(name) is not None]
    return (
        row | {"answers": [found[0]] if isinstance(found[0], str) else found[0]} if found else row
    )


def query_of(prompt: str) -> str:
    """Returns the query alone, without the solved examples before it; some prompts have none."""
    if not (prompt.startswith(_FIRST) and prompt.endswith(_LAST)):
        return prompt
    return prompt.removesuffix(_LAST).rpartition("\n\n")[2].removeprefix(_FIRST)
