"""The steps of a training run: which examples, in which rows, on which process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax.data.packing import Batch, fill_rows, loss_weights_per_example, pack
from olmoe_jax.data.tokenized import TokenizedDataset

if TYPE_CHECKING:
    import grain

_SHORTEST_ROW = 64
_ROW_MULTIPLE = 128
_SAMPLED_STEPS = 32
_PREFETCH_THREADS = 2
_PREFETCH_STEPS = 4


@dataclass(frozen=True)
class Step:
    """One optimizer step. `batches` are its micro-batches: this process's share of the rows.

    The counts are of the whole step over all processes: real tokens, padding tokens (empty rows
    included), examples, and targets that the loss covers.
    """

    index: int
    epoch: int
    batches: list[Batch]
    tokens: int
    padding: int
    examples: int
    targets: int


@dataclass(frozen=True)
class DataReport:
    """What a run reports of its data at the start. `padding_share` is that of the first epoch."""

    examples: int
    dropped_rows: int
    tokens: int
    padding_share: float
    steps_per_epoch: int
    total_steps: int
    row_length: int


class TrainingData:
    """The steps of a run as a Grain data set.

    A step is `batch_size` examples, chosen by (seed, step) alone; an epoch is every example once,
    and its last step may have fewer. With `pack` the examples share rows of `row_length` tokens
    (at most `max_seq_length`); without, each has a row of its own, and the rows of a step are as
    long as its longest example needs, rounded up to a power of two. Rows come in micro-batches of
    `rows_per_batch` (over all processes), the last one filled up with empty rows; of each, a
    process holds one contiguous share. With `one_microbatch` it is no sample of the steps that
    `row_length` is fitted to, but all. Raises ValueError when `rows_per_batch` is no multiple of
    `process_count`.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        batch_size: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        max_seq_length: int,
        pack: bool,
        rows_per_batch: int,
        loss_normalization: str,
        microbatch_examples: int,
        pad_id: int,
        one_microbatch: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        _check_shares(rows_per_batch, process_count)
        self.dataset = dataset
        self.steps_per_epoch = -(-len(dataset) // batch_size)
        every_epoch = epochs * self.steps_per_epoch
        self.total_steps = every_epoch if max_steps is None else min(max_steps, every_epoch)
        self._batch_size = batch_size
        self._epochs = epochs
        self._seed = seed
        self._pack = pack
        self._rows_per_batch = rows_per_batch
        self._loss_normalization = loss_normalization
        self._microbatch_examples = microbatch_examples
        self._pad_id = pad_id
        self._process_index = process_index
        self._process_count = process_count
        self.row_length = max_seq_length
        if pack:
            steps = self.epoch_examples()
            # Elsewhere a step that the sample misses may take one more.
            sample = self._repeated(steps) if one_microbatch else steps[:_SAMPLED_STEPS]
            self.row_length = self._shortest_row_length(max_seq_length, sample)

    def iterator(self) -> "grain.DatasetIterator[Step]":
        """Returns an iterator over the steps; get_state and set_state resume it exactly."""
        import grain

        # Grain counts on past the end of an epoch, so the index that map_with_index gives is the
        # step of the run, and the shuffle below it uses another order in every epoch.
        steps = self._repeated(self.epoch_examples().map_with_index(self._step))
        options = grain.ReadOptions(
            num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCH_STEPS
        )
        return iter(steps.to_iter_dataset(options))

    def first_epoch_padding_share(self) -> float:
        """Returns the exact share of padding in the rows of the first epoch."""
        places = 0
        for examples in self.epoch_examples():
            rows, row_length = self._rows(examples)
            places += len(rows) * row_length
        return 1 - int(self.dataset.lengths.sum()) / places

    def most_microbatches(self) -> int:
        """Returns the largest number of micro-batches in a step of the run."""
        return max(
            len(self._rows(examples)[0]) // self._rows_per_batch
            for examples in self._repeated(self.epoch_examples())
        )

    def _repeated(self, epoch: "grain.MapDataset") -> "grain.MapDataset":
        """The steps of the run, from those of one epoch."""
        return epoch.repeat(self._epochs).slice(slice(self.total_steps))

    def epoch_examples(self) -> "grain.MapDataset[np.ndarray]":
        """The example indices of each step of one epoch."""
        import grain

        order = grain.MapDataset.range(len(self.dataset)).shuffle(self._seed)
        return order.batch(self._batch_size, drop_remainder=False, batch_fn=np.asarray)

    def _shortest_row_length(self, max_seq_length: int, steps) -> int:
        """The shortest row that needs no more micro-batches than rows of `max_seq_length`.

        One length for the whole run, a multiple of 128, so that one program serves all steps.
        Without it, micro-batches of many rows are mostly empty rows: GSM8K's 256 examples fill ten
        rows of 4096, and eight devices would compute sixteen.

        `steps`: the examples of those that are looked at.
        """
        lengths = self.dataset.lengths
        sample = [lengths[examples] for examples in steps]

        def micro_batches(row_length: int) -> int:
            return sum(-(-len(pack(part, row_length)) // self._rows_per_batch) for part in sample)

        fits = micro_batches(max_seq_length)
        low = -(-int(lengths.max()) // _ROW_MULTIPLE)  # known to hold every example
        high = -(-max_seq_length // _ROW_MULTIPLE)  # known to fit
        while low < high:
            middle = (low + high) // 2
            if micro_batches(middle * _ROW_MULTIPLE) <= fits:
                high = middle
            else:
                low = middle + 1
        return min(high * _ROW_MULTIPLE, max_seq_length)

    def _rows(self, examples: np.ndarray) -> tuple[list[list[int]], int]:
        """Returns the step's rows over all processes, empty ones included, and their length."""
        lengths = self.dataset.lengths[examples]
        rows, row_length = _arrange(lengths, self.row_length, self._pack)
        return _with_empty_rows(rows, self._rows_per_batch), row_length

    def _step(self, index: int, examples: np.ndarray) -> Step:
        rows, row_length = self._rows(examples)
        targets = self.dataset.target_counts[examples]
        weights = loss_weights_per_example(
            targets, self._loss_normalization, self._microbatch_examples
        )
        batches = [
            fill_rows(self.dataset, examples, share, row_length, weights, self._pad_id)
            for share in _shares(
                rows, self._rows_per_batch, self._process_index, self._process_count
            )
        ]
        tokens = int(self.dataset.lengths[examples].sum())
        return Step(
            index=index,
            epoch=index // self.steps_per_epoch,
            batches=batches,
            tokens=tokens,
            padding=len(rows) * row_length - tokens,
            examples=len(examples),
            targets=int(targets.sum()),
        )


def describe(data: TrainingData) -> DataReport:
    """Returns what a run reports of its data at the start."""
    return DataReport(
        examples=len(data.dataset),
        dropped_rows=data.dataset.dropped_rows,
        tokens=int(data.dataset.lengths.sum()),
        padding_share=data.first_epoch_padding_share(),
        steps_per_epoch=data.steps_per_epoch,
        total_steps=data.total_steps,
        row_length=data.row_length,
    )


def evaluation_batches(
    dataset: TokenizedDataset,
    *,
    max_seq_length: int,
    pack: bool,
    rows_per_batch: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's share of batches over the whole data set; every target weighs 1.

    Rows are as in `TrainingData`, one batch is filled at a time, and all processes yield equally
    many. Raises ValueError when `rows_per_batch` is no multiple of `process_count`.
    """
    _check_shares(rows_per_batch, process_count)
    examples, weights = np.arange(len(dataset)), np.ones(len(dataset))
    rows, row_length = _arrange(dataset.lengths, max_seq_length, pack)
    rows = _with_empty_rows(rows, rows_per_batch)
    for share in _shares(rows, rows_per_batch, process_index, process_count):
        yield fill_rows(dataset, examples, share, row_length, weights, pad_id)


def _arrange(lengths: np.ndarray, max_seq_length: int, packed: bool) -> tuple[list[list[int]], int]:
    """Returns rows of indices into `lengths` and the length of a row."""
    if packed:
        return pack(lengths, max_seq_length), max_seq_length
    row_length, longest = _SHORTEST_ROW, int(lengths.max())
    if longest > max_seq_length:
        raise ValueError(f"an example has {longest} tokens, more than {max_seq_length}")
    while row_length < longest:
        row_length *= 2
    return [[index] for index in range(len(lengths))], min(row_length, max_seq_length)


def _with_empty_rows(rows: list[list[int]], rows_per_batch: int) -> list[list[int]]:
    return rows + [[]] * (-len(rows) % rows_per_batch)


def _shares(
    rows: Sequence[list[int]], rows_per_batch: int, process_index: int, process_count: int
) -> Iterator[Sequence[list[int]]]:
    """Yields this process's rows of each micro-batch."""
    share = rows_per_batch // process_count
    for start in range(process_index * share, len(rows), rows_per_batch):
        yield rows[start : start + share]


def _check_shares(rows_per_batch: int, process_count: int) -> None:
    if rows_per_batch < 1 or rows_per_batch % process_count:
        raise ValueError(
            f"rows_per_batch={rows_per_batch} must be a positive multiple of the number of "
            f"processes, {process_count}"
        )
