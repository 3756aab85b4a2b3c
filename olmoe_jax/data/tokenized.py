"""A data set as flat arrays of tokens, tokenised once and cached on disk."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from olmoe_jax.data.cache import load_arrays, save_arrays
from olmoe_jax.data.formats import (
    RULES_VERSION,
    FormattedRow,
    TokenizedExample,
    encode_batch,
    format_row,
)
from olmoe_jax.data.reading import content_digest, read_rows, row_location
from olmoe_jax.errors import UserError
from olmoe_jax.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of the cache's directory name alone: raise it whenever the stored arrays change their layout.
# A new layout holds the same examples, so a run may continue across it.
_CACHE_VERSION = 2
_ROWS_PER_TOKENIZER_CALL = 1000


@dataclass(frozen=True)
class TokenizedDataset:
    """The examples of a data file that train, in the order of the file.

    Attributes:
      tokens: int32 [all tokens], the stored examples one after the other.
      trained: bool [all tokens], the tokens that the loss covers.
      offsets: int64 [stored examples + 1], where each example starts in `tokens`.
      prompt_lengths: int32 [stored examples], see `TokenizedExample`.
      rows: int64 [N], the stored examples that this data set holds.
      dropped_rows: rows of the data file without a token to train on, also in a subset.
      total_rows: rows of the data file, also in a subset.
      origin: the named parts that determine the stored examples, see `identity`.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    rows: np.ndarray
    dropped_rows: int
    total_rows: int
    origin: Mapping[str, str | int]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: the number of tokens of each example."""
        return np.diff(self.offsets)[self.rows]

    @cached_property
    def target_counts(self) -> np.ndarray:
        """int64 [N]: the trained tokens of each example that are a target.

        The first token of an example is never a target, because no token before it predicts it.
        """
        starts = self.offsets[:-1]
        trained = np.add.reduceat(self.trained, starts, dtype=np.int64)
        return (trained - self.trained[starts])[self.rows]

    def example(self, index: int) -> TokenizedExample:
        """Returns example `index` of this data set; its arrays are views."""
        row = self.rows[index]
        span = slice(self.offsets[row], self.offsets[row + 1])
        return TokenizedExample(
            self.tokens[span], self.trained[span], int(self.prompt_lengths[row])
        )

    def subset(self, indices: Sequence[int] | np.ndarray) -> "TokenizedDataset":
        """Returns a data set of the examples at `indices`, in that order, on the same arrays."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    def identity(self) -> dict[str, str | int]:
        """Returns the named parts that determine the examples, for a message that names one.

        content: hash of the data file or of the hub's rows.
        tokenizer: hash of the tokenizer and its end-of-text token.
        max_seq_length: the length at which an example is cut.
        rules: the version of the rules in data/formats.py.
        split: hash of the positions of this set's examples among those of the file.
        """
        return {**self.origin, "split": hashlib.sha256(self.rows.tobytes()).hexdigest()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of `identity()`: two data sets with the same one hold the same examples."""
        return _hash(self.identity())


def tokenize_dataset(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_length: int,
    split: str = "train",
) -> TokenizedDataset:
    """Returns the tokenised rows of `path` (see `read_rows`), from the cache where it holds them.

    The cache is $OLMOE_JAX_CACHE, or ~/.cache/olmoe_jax.

    Raises:
      UserError: a row cannot be read or formatted (the message names file and line), no row is left
        to train on, or the cache cannot be written.
    """
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length must be positive, not {max_seq_length}")
    origin: dict[str, str | int] = {
        "content": content_digest(path, split),
        "tokenizer": _tokenizer_digest(tokenizer),
        "max_seq_length": max_seq_length,
        "rules": RULES_VERSION,
    }
    root = os.environ.get("OLMOE_JAX_CACHE") or "~/.cache/olmoe_jax"
    directory = user_path(root) / "tokenized" / _hash([_CACHE_VERSION, origin])
    cached = load_arrays(directory)
    if cached is None:
        arrays, info = _tokenize(path, read_rows(path, split), tokenizer, max_seq_length)
        try:
            save_arrays(directory, arrays, info)
        except OSError as error:
            raise UserError(
                f"cannot write the token cache {directory} ({error.strerror}): "
                "set OLMOE_JAX_CACHE to a directory with space that you may write to"
            ) from error
        cached = load_arrays(directory) or (arrays, info)
    arrays, info = cached
    return TokenizedDataset(
        tokens=arrays["tokens"],
        trained=arrays["trained"],
        offsets=arrays["offsets"],
        prompt_lengths=arrays["prompt_lengths"],
        rows=np.arange(len(arrays["prompt_lengths"])),
        dropped_rows=info["dropped_rows"],
        total_rows=info["total_rows"],
        origin=origin,
    )


def held_out_split(
    dataset: TokenizedDataset, fraction: float, seed: int
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """Returns (train, evaluation), where `seed` draws the share of examples that is held out.

    Both keep the order of the data set and have at least one example.

    Raises:
      UserError: the data set has fewer than two examples.
      ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")
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
    path: str,
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_length: int,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns the arrays and the counts of `TokenizedDataset`, for the cache."""
    kept: list[TokenizedExample] = []
    for start in range(0, len(rows), _ROWS_PER_TOKENIZER_CALL):
        chunk = rows[start : start + _ROWS_PER_TOKENIZER_CALL]
        texts = [
            format_row_of(path, start + index, row, tokenizer.eos_token)
            for index, row in enumerate(chunk)
        ]
        examples = encode_batch(texts, tokenizer, max_seq_length)
        kept += [example for example in examples if example.trained.any()]
    if not kept:
        raise UserError(
            f"{path}: no row has a token to train on within max_seq_length={max_seq_length}; "
            "raise data.max_seq_length"
        )
    arrays = {
        "tokens": np.concatenate([example.tokens for example in kept]),
        "trained": np.concatenate([example.trained for example in kept]),
        "offsets": np.cumsum([0, *(len(example.tokens) for example in kept)], dtype=np.int64),
        "prompt_lengths": np.array([example.prompt_length for example in kept], np.int32),
    }
    return arrays, {"dropped_rows": len(rows) - len(kept), "total_rows": len(rows)}


def format_row_of(path: str, index: int, row: dict[str, Any], eos: str) -> FormattedRow:
    """Returns `format_row` of row `index` of a data file; errors name the file and the line."""
    try:
        return format_row(row, eos)
    except UserError as error:
        raise UserError(f"{path}, {row_location(path, index)}: {error}") from error
