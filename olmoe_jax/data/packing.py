"""Examples into rows of fixed length, with what a model needs to keep them apart."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from olmoe_jax.data.tokenized import TokenizedDataset

# Filling rows one by one takes time with the square of the number of examples, and with many
# examples best-fit is within a row or so of the fewest anyway.
_MOST_TO_FILL_ROW_BY_ROW = 2048


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; every array is [rows, row_length].

    tokens int32: the pad id where there is no example.
    targets int32: the next token of the same example, 0 where there is none.
    segment_ids int32: 1, 2, ... for the examples of a row, 0 for padding.
    positions int32: from 0 in every example, 0 in padding.
    loss_weights float32: the weight of predicting `targets`, 0 where that is not trained.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_weights: np.ndarray


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, as few as can be found quickly.

    The lengths of a row sum to at most `row_length`; every index is in exactly one row. Raises
    ValueError when one example is longer than a row.
    """
    sizes = [int(length) for length in lengths]
    if sizes and max(sizes) > row_length:
        raise ValueError(f"an example has {max(sizes)} tokens, a row only {row_length}")
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    rows = _best_fit(order, sizes, row_length)
    fewest = -(-sum(sizes) // row_length)
    if len(rows) > fewest and len(sizes) <= _MOST_TO_FILL_ROW_BY_ROW:
        rows = min(rows, _fill_row_by_row(order, sizes, row_length), key=len)
    return rows


def _best_fit(order: list[int], sizes: list[int], row_length: int) -> list[list[int]]:
    """Puts each index where it leaves the least space."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in order:
        fitting = bisect_left(open_rows, (sizes[index], 0))
        if fitting == len(open_rows):
            space, row = row_length, len(rows)
            rows.append([])
        else:
            space, row = open_rows.pop(fitting)
        rows[row].append(index)
        insort(open_rows, (space - sizes[index], row))
    return rows


def _fill_row_by_row(order: list[int], sizes: list[int], row_length: int) -> list[list[int]]:
    """Gives each row the first index left, and of the others those that fill it best."""
    rows = []
    while order:
        first, *others = order
        capacity = row_length - sizes[first]
        chosen = set(_fullest_subset([sizes[index] for index in others], capacity))
        rows.append([first, *(index for k, index in enumerate(others) if k in chosen)])
        order = [index for k, index in enumerate(others) if k not in chosen]
    return rows


def _fullest_subset(sizes: list[int], capacity: int) -> list[int]:
    """Returns the indices of a subset with the largest sum that is at most `capacity`."""
    within_capacity = (1 << (capacity + 1)) - 1
    sums = [1]  # bit s of sums[k]: some of the first k sizes sum to s
    for size in sizes:
        if sums[-1] >> capacity:
            break
        sums.append((sums[-1] | sums[-1] << size) & within_capacity)
    total = sums[-1].bit_length() - 1
    chosen = []
    for k in reversed(range(len(sums) - 1)):
        if not sums[k] >> total & 1:
            chosen.append(k)
            total -= sizes[k]
    return chosen


def loss_weights_per_example(
    target_counts: Sequence[int] | np.ndarray, normalization: str, microbatch_examples: int
) -> np.ndarray:
    """Returns float64 [n]: the weight of each trained target of each of a step's n examples.

    "tokens": the loss is the mean over all trained targets of the step. "microbatch": it is the
    mean over groups of `microbatch_examples` consecutive examples of the mean over the group's
    trained targets, as gradient accumulation gives it in the PyTorch reference; a group without
    targets is left out. Either way the weights of all trained targets sum to 1 (to 0 in a step
    without any). Raises ValueError for another `normalization`.
    """
    counts = np.asarray(target_counts, np.int64)
    if normalization == "tokens":
        groups = np.zeros(len(counts), np.int64)
    elif normalization == "microbatch":
        groups = np.arange(len(counts)) // microbatch_examples
    else:
        raise ValueError(f"loss normalization must be tokens or microbatch, not {normalization}")
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
    """Returns the batch of `rows`, each a list of indices into `examples`; a row may be empty.

    `examples` are indices into `dataset`; `weights` [len(examples)] is the weight of each trained
    target of each example.
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
            tokens, trained = dataset.example(examples[member])
            end = start + len(tokens)
            batch.tokens[row, start:end] = tokens
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(len(tokens))
            batch.targets[row, start : end - 1] = tokens[1:]
            batch.loss_weights[row, start : end - 1] = trained[1:] * weights[member]
            start = end
    return batch
