"""The steps of a training run: their examples, the rows of these, and each process's share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax.data.packing import Batch, fill_rows, loss_weights_per_example, pack
from olmoe_jax.data.tokenized import TokenizedDataset

if TYPE_CHECKING:
    import grain

_SHORTEST_ROW = 64  # of unpacked rows: shorter ones would only add programs to compile
_ROW_MULTIPLE = 128  # of packed rows, the tile of the attention kernels
_SAMPLED_STEPS = 32  # packed at the start to choose the row length; more would delay the start
_PREFETCH_THREADS = 2
_PREFETCH_STEPS = 4


@dataclass(frozen=True)
class Step:
    """The input of one optimizer step. The counts cover all processes."""

    index: int  # the number of the step in the run, from 0
    epoch: int  # from 0
    batches: list[Batch]  # this process's rows of each micro-batch
    tokens: int  # of examples
    padding: int  # tokens, those of empty rows included
    examples: int
    targets: int  # that the loss covers


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The steps of a run as a Grain data set.

    A step is `batch_size` examples, chosen by (seed, step) alone. An epoch is every example once,
    or as often as its source's weight says; the last step of an epoch may have fewer examples.

    With `pack`, examples share rows of `row_length` tokens. Otherwise each example has a row of its
    own, and the rows of a step are as long as its longest example needs, rounded up to a power of
    two. Empty rows fill the last micro-batch of a step. A process holds one contiguous share of
    each micro-batch.
    """

    dataset: TokenizedDataset
    _: KW_ONLY
    batch_size: int  # examples of a step, over all processes
    epochs: int
    max_steps: int | None  # the step at which the run ends, if the epochs do not end earlier
    seed: int  # of the order of the examples; every epoch has another order
    max_seq_length: int  # the longest row
    pack: bool
    rows_per_batch: int  # rows of a micro-batch, over all processes
    loss_normalization: str  # see `loss_weights_per_example`
    microbatch_examples: int  # see `loss_weights_per_example`
    pad_id: int
    process_index: int = 0
    process_count: int = 1

    @cached_property
    def first_epoch(self) -> TokenizedDataset:
        """The examples of the first epoch, see `TokenizedDataset.epoch`."""
        return self.dataset.epoch(0, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.first_epoch) // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        every_epoch = self.epochs * self.steps_per_epoch
        return every_epoch if self.max_steps is None else min(self.max_steps, every_epoch)

    @cached_property
    def row_length(self) -> int:
        """The length of a packed row; of an unpacked row the longest possible."""
        return self._shortest_row_length() if self.pack else self.max_seq_length

    def iterator(self) -> "grain.DatasetIterator[Step]":
        """Returns an iterator over the steps; get_state and set_state resume it exactly."""
        import grain

        # Grain's index counts on past the end of an epoch. So the index that map_with_index gives
        # is the step of the run, and the shuffle below gives another order in every epoch.
        steps = self.epoch_examples().map_with_index(self._step)
        steps = steps.repeat(self.epochs).slice(slice(self.total_steps))
        options = grain.ReadOptions(
            num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCH_STEPS
        )
        return iter(steps.to_iter_dataset(options))

    def first_epoch_padding_share(self) -> float:
        """Returns the exact share of padding in the rows of the first epoch."""
        places = 0
        for examples in self.epoch_examples():
            rows, row_length = self._arranged(self.first_epoch.lengths[examples])
            places += len(rows) * row_length
        return 1 - int(self.first_epoch.lengths.sum()) / places

    def epoch_examples(self) -> "grain.MapDataset[np.ndarray]":
        """Returns the steps of an epoch, each as int64 [examples] indices into its examples."""
        import grain

        order = grain.MapDataset.range(len(self.first_epoch)).shuffle(self.seed)
        return order.batch(self.batch_size, drop_remainder=False, batch_fn=np.asarray)

    @cached_property
    def _epoch(self) -> Callable[[int], TokenizedDataset]:
        """The function that returns the examples of an epoch."""
        # Where an epoch ends, Grain's threads prepare steps of two.
        return lru_cache(maxsize=2)(lambda number: self.dataset.epoch(number, self.seed))

    def _shortest_row_length(self) -> int:
        """Returns the shortest row that needs no more micro-batches than rows of `max_seq_length`.

        The run has one row length, a multiple of 128, so that one program serves all steps. Rows
        of `max_seq_length` would leave most rows of a large micro-batch empty: the 256 examples of
        a GSM8K step fill ten rows of 4096 tokens, and eight devices would compute sixteen.

        The first steps of an epoch are a sample. A later step may need one micro-batch more.
        """
        lengths = self.first_epoch.lengths
        sample = [lengths[examples] for examples in self.epoch_examples()[:_SAMPLED_STEPS]]

        def micro_batches(row_length: int) -> int:
            return sum(-(-len(pack(part, row_length)) // self.rows_per_batch) for part in sample)

        fits = micro_batches(self.max_seq_length)
        # Known to hold every example, those of later epochs too.
        low = -(-int(self.dataset.lengths.max()) // _ROW_MULTIPLE)
        high = -(-self.max_seq_length // _ROW_MULTIPLE)  # known to fit
        while low < high:
            middle = (low + high) // 2
            if micro_batches(middle * _ROW_MULTIPLE) <= fits:
                high = middle
            else:
                low = middle + 1
        return min(high * _ROW_MULTIPLE, self.max_seq_length)

    def _arranged(self, lengths: np.ndarray) -> tuple[list[list[int]], int]:
        return _arrange(lengths, self.row_length, self.pack, self.rows_per_batch)

    def _step(self, index: int, examples: np.ndarray) -> Step:
        epoch = index // self.steps_per_epoch
        dataset = self._epoch(epoch)
        lengths, targets = dataset.lengths[examples], dataset.target_counts[examples]
        rows, row_length = self._arranged(lengths)
        weights = loss_weights_per_example(
            targets, self.loss_normalization, self.microbatch_examples
        )
        batches = [
            fill_rows(dataset, examples, share, row_length, weights, self.pad_id)
            for share in _shares(rows, self.rows_per_batch, self.process_index, self.process_count)
        ]
        tokens = int(lengths.sum())
        return Step(
            index=index,
            epoch=epoch,
            batches=batches,
            tokens=tokens,
            padding=len(rows) * row_length - tokens,
            examples=len(examples),
            targets=int(targets.sum()),
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

    Rows are as in `TrainingData`. All processes yield equally many batches. A batch is filled when
    the caller asks for the batch, so that one batch is in memory at a time.
    """
    examples, weights = np.arange(len(dataset)), np.ones(len(dataset))
    rows, row_length = _arrange(dataset.lengths, max_seq_length, pack, rows_per_batch)
    for share in _shares(rows, rows_per_batch, process_index, process_count):
        yield fill_rows(dataset, examples, share, row_length, weights, pad_id)


def _arrange(
    lengths: np.ndarray, row_length: int, packed: bool, rows_per_batch: int
) -> tuple[list[list[int]], int]:
    """Returns rows of indices into `lengths` over all processes, and the length of the rows.

    Empty rows fill the last micro-batch. Rows that are not packed have at most `row_length` tokens.
    """
    if packed:
        rows = pack(lengths, row_length)
    else:
        rows = [[index] for index in range(len(lengths))]
        needed = _SHORTEST_ROW
        while needed < lengths.max():
            needed *= 2
        row_length = min(needed, row_length)
    return rows + [[]] * (-len(rows) % rows_per_batch), row_length


def _shares(
    rows: Sequence[list[int]], rows_per_batch: int, process_index: int, process_count: int
) -> Iterator[Sequence[list[int]]]:
    """Yields this process's rows of each micro-batch."""
    if rows_per_batch % process_count:  # rows would be lost
        raise ValueError(
            f"rows_per_batch={rows_per_batch} must be a multiple of the number of processes, "
            f"{process_count}"
        )
    share = rows_per_batch // process_count
    for start in range(process_index * share, len(rows), rows_per_batch):
        yield rows[start : start + share]
