"""Examples packed into rows of a fixed length, and the segments that keep them apart."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from olmoe_jax.data.tokenized import TokenizedDataset


class Batch(NamedTuple):
    """Rows of tokens; every array is [rows, row_length]."""

    tokens: np.ndarray  # int32: the pad id in padding
    targets: np.ndarray  # int32: the next token of the same example, 0 where an example has none
    segment_ids: np.ndarray  # int32: 1, 2, … for the examples of a row, 0 for padding
    positions: np.ndarray  # int32: from 0 in every example, 0 in padding
    loss_weights: np.ndarray  # float32: of predicting `targets`, 0 where the loss leaves it out


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Returns rows of indices into `lengths` by best-fit decreasing.

    The lengths of a row sum to at most `row_length`, and every index is in exactly one row. Longest
    first, each example goes into the row where it leaves the least space. A search for the fullest
    rows saves less than 1% of the rows of GSM8K (`python -m benchmarks.packing` prints how far the
    rows are from the fewest conceivable). No example may be longer than a row.
    """
    sizes = [int(length) for length in lengths]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = bisect_left(open_rows, (sizes[index], 0))
        if fitting == len(open_rows):
            space, row = row_length, len(rows)
            rows.append([])
        else:
            space, row = open_rows.pop(fitting)
        rows[row].append(index)
        insort(open_rows, (space - sizes[index], row))
    return rows


def loss_weights_per_example(
    target_counts: Sequence[int] | np.ndarray, normalization: str, microbatch_examples: int
) -> np.ndarray:
    """Returns float64 [n]: for each example of a step, the loss weight of its trained targets.

    The weights of all trained targets of the step sum to 1 (to 0 in a step without any). The loss
    is the weighted sum over the targets, whatever rows the examples share.

    Args:
      target_counts: [n], the trained targets of each example.
      normalization: "tokens" makes the loss the mean over all trained targets of the step.
        "microbatch" takes the mean over each group of consecutive examples, then the mean over the
        groups, as gradient accumulation does in the PyTorch reference. A group without a trained
        target is left out.
      microbatch_examples: the examples of a group.
    """
    counts = np.asarray(target_counts, np.int64)
    groups = np.arange(len(counts)) // microbatch_examples
    if normalization == "tokens":
        groups[:] = 0
    group_counts = np.bincount(groups, weights=counts)
    weights = np.zeros(len(group_counts))
    filled = group_counts > 0
    weights[filled] = 1 / (group_counts[filled] * np.count_nonzero(filled))
    return weights[groups]


def fill_rows(
    dataset: TokenizedDataset,
    examples: Sequence[int] | np.ndarray,
    rows: Sequence[Sequence[int]],
    row_length: int,
    weights: np.ndarray,
    pad_id: int,
) -> Batch:
    """Returns the batch of `rows`.

    Args:
      dataset: the examples.
      examples: [n] indices into `dataset`.
      rows: for each row the indices into `examples` that share the row; a row may be empty.
      row_length: tokens of a row, at least the sum of any row's examples.
      weights: [n], the loss weight of each trained target of an example.
      pad_id: the token id of padding.
    """
    shape = (len(rows), row_length)
    batch = Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        loss_weights=np.zeros(shape, np.float32),
    )
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, 1):
            example = dataset.example(examples[member])
            tokens, in_loss = example.tokens, example.in_loss
            end = start + len(tokens)
            batch.tokens[row, start:end] = tokens
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(len(tokens))
            # The last token of an example has no target: the next token is another example's.
            batch.targets[row, start : end - 1] = tokens[1:]
            batch.loss_weights[row, start : end - 1] = in_loss[1:] * weights[member]
            start = end
    return batch
