"""A data set as flat arrays of tokens, tokenised once and cached on disk."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from olmoe_jax.data.cache import load_arrays, save_arrays
from olmoe_jax.data.counts import Counts
from olmoe_jax.data.formats import (
    LONG_TEXT,
    RULES_VERSION,
    FormattedRow,
    RowRules,
    TokenizedExample,
    encode_batch,
    format_row,
    row_rules,
)
from olmoe_jax.data.reading import about_rows, check_distinct, content_digest, read_source
from olmoe_jax.errors import UserError, os_reason
from olmoe_jax.files import cache_directory
from olmoe_jax.sources import Source, parse

if TYPE_CHECKING:
    import tqdm
    from transformers import PreTrainedTokenizerBase

# Part of the cache's directory name alone: increase it whenever the stored arrays change their
# layout. A new layout holds the same examples, so a run may continue across it.
_CACHE_VERSION = 8
_ARRAYS = {
    "tokens": np.int32,
    "in_loss": np.bool_,
    "lengths": np.int32,
    "counts": np.int64,
}
"""The arrays of the cache: those of `TokenizedDataset`, with lengths in place of offsets."""
_BATCH_ROWS = 1000
_BAR_DELAY = 2
"""Seconds of work before there is a progress bar."""


@dataclass(frozen=True)
class TokenizedDataset:
    """The examples of some sources that train, in the order of the sources and their rows.

    The arrays of all stored examples are shared with subsets.
    """

    tokens: np.ndarray  # int32 [all tokens]: the stored examples one after the other
    in_loss: np.ndarray  # bool [all tokens]: the tokens that the loss covers
    offsets: np.ndarray  # int64 [stored examples + 1]: where each example starts in `tokens`
    members: np.ndarray  # int64 [N]: which of the stored examples this data set holds
    sources: Sequence[Source]  # where the rows come from
    source_counts: Sequence[Counts]  # of the rows of each source, also in a subset
    origin: Mapping[str, str | int]  # the parts that determine the stored examples: `identity`

    def __len__(self) -> int:
        return len(self.members)

    @property
    def counts(self) -> Counts:
        """Returns what became of the rows of all sources, also in a subset."""
        return sum(self.source_counts, Counts())

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: the number of tokens of each example."""
        return np.diff(self.offsets)[self.members]

    @cached_property
    def target_counts(self) -> np.ndarray:
        """int64 [N]: the tokens of each example that are a target and in the loss.

        The first token of an example is never a target, because no token before it predicts it.
        """
        starts = self.offsets[:-1]
        counts = np.add.reduceat(self.in_loss, starts, dtype=np.int64)
        return (counts - self.in_loss[starts])[self.members]

    def example(self, index: int) -> TokenizedExample:
        """Returns example `index` of this data set; its arrays are views."""
        stored = self.members[index]
        span = slice(self.offsets[stored], self.offsets[stored + 1])
        return TokenizedExample(self.tokens[span], self.in_loss[span])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "TokenizedDataset":
        """Returns a data set of the examples at `indices`, in that order, on the same arrays."""
        return replace(self, members=self.members[np.asarray(indices, np.int64)])

    def of_source(self, number: int) -> np.ndarray:
        """Returns int64 [n], which of the examples come from source `number`."""
        ends = np.cumsum([counts.kept for counts in self.source_counts])
        return np.flatnonzero(np.searchsorted(ends, self.members, side="right") == number)

    def sets(self) -> "dict[str | None, TokenizedDataset]":
        """Returns the examples of each name that a source has, in the order of the sources.

        None is the name of the sources that have none.
        """
        numbers: dict[str | None, list[np.ndarray]] = {}
        for number, source in enumerate(self.sources):
            numbers.setdefault(source.name, []).append(self.of_source(number))
        # In the order of this data set, as if no source had a name.
        order = {name: np.sort(np.concatenate(parts)) for name, parts in numbers.items()}
        return {name: self.subset(examples) for name, examples in order.items()}

    def epoch(self, number: int, seed: int) -> "TokenizedDataset":
        """Returns the examples that an epoch takes: each as often as its source's weight says.

        All epochs take equally many examples of a source: its examples times its weight, rounded,
        and at least one. They go round the examples in an order drawn by `seed`. So however many
        epochs there are, the numbers of times that two examples of a source were taken differ by
        one at most.

        Raises:
          UserError: no example of a source is left.
        """
        if all(source.weight == 1 for source in self.sources):
            return self
        taken = []
        for index, source in enumerate(self.sources):
            own = self.of_source(index)
            if not len(own):
                raise UserError(
                    f"{source}: all its examples are held out for evaluation; add rows, or set "
                    "data.eval_path or data.eval_fraction=0"
                )
            count = max(round(len(own) * source.weight), 1)
            if count % len(own):
                own = np.random.RandomState(seed).permutation(own)
            taken.append(own[np.arange(number * count, (number + 1) * count) % len(own)])
        return self.subset(np.concatenate(taken))

    def identity(self) -> dict[str, str | int]:
        """Returns the named parts that determine the examples, for a message that names one.

        These are `origin`, the weights of the sources if one of them is not 1, and as `split` a
        hash of the positions of this set's examples among those of the sources.
        """
        weights = [source.weight for source in self.sources]
        weighted = {"weights": str(weights)} if set(weights) != {1} else {}
        split = hashlib.sha256(self.members.tobytes()).hexdigest()
        return {**self.origin, **weighted, "split": split}


def tokenize_dataset(
    data: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_length: int,
    split: str | None = None,
    rules: RowRules | None = None,
    config: str | None = None,
    progress: bool = False,
) -> TokenizedDataset:
    """Returns the tokenised rows of some sources, from the cache where it holds them.

    The cache is $OLMOE_JAX_CACHE, or ~/.cache/olmoe_jax.

    Args:
      data, config, split: the sources, see `olmoe_jax.sources.parse`; the default split is train.
      tokenizer: from `load_tokenizer`.
      max_seq_length: the length in tokens at which an example is cut.
      rules: how rows become text; None: `row_rules` of the tokenizer.
      progress: shows a bar on a terminal.

    Raises:
      UserError: a row cannot be read or formatted (the message names file and line), no row is left
        to train on, or the cache cannot be written.
    """
    rules = rules or row_rules(tokenizer)
    sources = parse(data, config, split)
    check_distinct(sources)
    digests = [content_digest(source) for source in sources]
    origin: dict[str, str | int] = {
        # Of the data files, or of the hub's rows.
        "content": digests[0] if len(digests) == 1 else _hash(digests),
        "tokenizer": _tokenizer_digest(tokenizer),
        "max_seq_length": max_seq_length,
        "rules": RULES_VERSION,
        **rules.identity(),
    }
    directory = cache_directory("tokenized") / _hash([_CACHE_VERSION, origin])
    arrays = load_arrays(directory, _ARRAYS)
    if arrays is None:
        try:
            parts = _tokenize(sources, tokenizer, max_seq_length, rules, progress)
            save_arrays(directory, _ARRAYS, parts)
        except OSError as error:
            raise UserError(
                f"cannot write the token cache {directory} ({os_reason(error)}): "
                "set OLMOE_JAX_CACHE to a directory with space that you may write to"
            ) from error
        arrays = load_arrays(directory, _ARRAYS)
    if arrays is None:
        raise UserError(f"the token cache {directory} changes while it is read; check the disk")
    return TokenizedDataset(
        tokens=arrays["tokens"],
        in_loss=arrays["in_loss"],
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
        members=np.arange(len(arrays["lengths"])),
        sources=sources,
        source_counts=[
            Counts(*numbers) for numbers in arrays["counts"].reshape(len(sources), -1).tolist()
        ],
        origin=origin,
    )


def held_out_split(
    dataset: TokenizedDataset, fraction: float, seed: int
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """Returns (train, evaluation); `seed` draws the fraction of the examples that is held out.

    Both keep the order of the data set and have at least one example.

    Raises:
      UserError: the data set has fewer than two examples.
    """
    count = len(dataset)
    if count < 2:
        raise UserError(
            "cannot hold out evaluation examples from a data set with one example: "
            "set data.eval_path or data.eval_fraction=0"
        )
    held_out = min(max(round(count * fraction), 1), count - 1)
    # numpy promises that the stream of RandomState never changes. Another stream would make a
    # resumed run train on what the run evaluated on.
    order = np.random.RandomState(seed).permutation(count)
    return dataset.subset(np.sort(order[held_out:])), dataset.subset(np.sort(order[:held_out]))


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    serialised = json.loads(tokenizer.backend_tokenizer.to_str())
    # Every call of the tokenizer sets these two, and the calls here use neither.
    serialised.pop("truncation", None)
    serialised.pop("padding", None)
    return _hash([serialised, tokenizer.eos_token])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tokenize(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_length: int,
    rules: RowRules,
    progress: bool,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of `_ARRAYS` part by part, for the cache."""
    ends, all_counts = rules.ends(tokenizer.eos_token_id), []
    with _progress_bar(sources, progress) as bar:
        for source in sources:
            counts = Counts()
            for texts in _batches(source, tokenizer.eos_token, rules):
                examples = list(encode_batch(texts, tokenizer, max_seq_length))
                learnt = [example for example in examples if example.in_loss.any()]
                counts += Counts.of(examples, ends)
                bar.update(len(texts))
                if learnt:
                    yield {
                        "tokens": np.concatenate([example.tokens for example in learnt]),
                        "in_loss": np.concatenate([example.in_loss for example in learnt]),
                        "lengths": np.array([len(example.tokens) for example in learnt], np.int32),
                    }
            if not counts.kept:
                raise UserError(
                    f"{source}: no row has a token to train on within "
                    f"max_seq_length={max_seq_length}; raise data.max_seq_length"
                    if counts.cut
                    else f"{source}: no row has an answer that trains; write turns with the role "
                    "assistant and without weight=0, or set data.train_on=all"
                )
            all_counts.append(astuple(counts))
    yield {"counts": np.array(all_counts)}


def _progress_bar(sources: Sequence[Source], wanted: bool) -> "tqdm.tqdm":
    """Returns a bar of rows on stderr, which a terminal shows after two seconds."""
    import tqdm

    shown = wanted and sys.stderr.isatty()
    return tqdm.tqdm(
        desc="tokenising",
        total=about_rows(sources) if shown else None,
        unit=" rows",
        delay=_BAR_DELAY,
        leave=False,
        disable=not shown,
    )


def _batches(source: Source, eos: str, rules: RowRules) -> Iterator[list[FormattedRow]]:
    """Yields the formatted rows of a source in batches of about `LONG_TEXT` characters."""
    batch, size = [], 0
    for place, row in read_source(source):
        batch.append(format_row_at(place, row, eos, rules))
        size += len(batch[-1].text)
        if size >= LONG_TEXT or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def format_row_at(place: str, row: Mapping[str, Any], eos: str, rules: RowRules) -> FormattedRow:
    """Returns `format_row` of a row of `read_rows`; errors name its place."""
    try:
        return format_row(row, eos, rules)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
