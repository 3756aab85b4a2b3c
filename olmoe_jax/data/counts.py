"""Counts of what became of a data set's rows."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from olmoe_jax.data.formats import EncodedRow
from olmoe_jax.sources import Source, short


@dataclass(frozen=True)
class Counts:
    """Numbers of rows, and of their tokens."""

    rows: int = 0  # read
    dropped: int = 0  # without a token to train on
    cut: int = 0  # longer than an example may be
    lost_end: int = 0  # cut, so that an answer that trains has lost its end
    without_end: int = 0  # not cut, but the answer does not end in a token that ends a turn
    empty: int = 0  # that train on an empty answer
    straddling: int = 0  # with a token that holds the end of a prompt and the start of an answer
    templated: int = 0  # rendered by a chat template
    tokens: int = 0  # of the rows that were not dropped
    trained: int = 0  # tokens that the loss covers

    @classmethod
    def of(cls, examples: Iterable[EncodedRow], ends: Collection[int]) -> "Counts":
        """Returns the counts of some rows, given the token ids that end a turn."""
        numbers = np.zeros(len(fields(cls)), np.int64)
        for row in examples:
            trains = bool(row.in_loss.any())
            open_ended = trains and not _ends(row, ends)
            numbers += [
                1,
                not trains,
                row.cut,
                row.cut and open_ended,
                open_ended and not row.cut,
                row.empty,
                bool(row.straddling.any()),
                row.templated,
                trains * len(row.tokens),
                int(row.in_loss.sum()),
            ]
        return cls(*numbers.tolist())

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def kept(self) -> int:
        """Rows that were not dropped."""
        return self.rows - self.dropped

    def describe(self, max_seq_length: int) -> str:
        """Returns the counts in words; those that are seldom only where they are not 0."""
        words = [
            f"{self.dropped:,} of {self.rows:,} rows dropped",
            f"{self.cut:,} cut at {max_seq_length:,} tokens",
        ]
        if self.cut:
            words[-1] += f", of which {self.lost_end:,} lost the end of an answer"
        if self.without_end:
            words.append(f"{self.without_end:,} without an end token")
        if self.empty:
            words.append(f"{self.empty:,} with an empty answer")
        if self.straddling:
            words.append(f"{self.straddling:,} with a token of both prompt and answer")
        return ", ".join(words)


def source_table(sources: Sequence[Source], counts: Sequence[Counts]) -> list[str]:
    """Returns lines with the counts of each source, if there are several."""
    if len(sources) == 1:
        return []
    rows = [("source", *_COLUMNS)]
    names = [short(str(source)) for source in sources]
    if len({*names}) < len(names):
        names = [*map(str, sources)]
    for name, of in zip(names, counts, strict=True):
        numbers = (of.rows, of.dropped, of.cut, of.without_end, of.tokens, of.trained)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    width = max(len(row[0]) for row in rows)
    return [f"  {name:{width}}" + "".join(f"{cell:>14}" for cell in row) for name, *row in rows]


_COLUMNS = ("rows", "dropped", "cut", "without end", "tokens", "that train")


def _ends(row: EncodedRow, ends: Collection[int]) -> bool:
    """Returns whether the last part that trains ends in an end token, or one and whitespace."""
    last = int(np.flatnonzero(row.in_loss)[-1])
    for index in range(last, max(last - 3, -1), -1):
        if not row.in_loss[index]:
            break
        if row.tokens[index] in ends:
            return True
    return False
