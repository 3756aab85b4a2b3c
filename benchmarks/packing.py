"""Padding of packed rows: python -m benchmarks.packing --data FILE --tokenizer DIR

Prints how many rows of the full length 20 epochs in different orders take, beside the fewest that
any packing could take: the tokens of each step over the row length, rounded up. Then prints, for
micro-batches of 1, 2, 4, 8 and 16 rows, the row length that the pipeline chooses and the share of
padding over one epoch (empty rows included), beside rows of the full length.
"""

from collections.abc import Sequence

import numpy as np

from olmoe_jax.data import TokenizedDataset, TrainingData, load_tokenizer, tokenize_dataset
from olmoe_jax.data.packing import pack
from olmoe_jax.errors import ArgumentParser, run_command, whole_number

ORDERS = 20
"""Orders of the examples, so that one lucky epoch does not decide."""


def main(arguments: Sequence[str]) -> None:
    """Prints the table for a data file. Raises `UserError` for bad usage or bad data."""
    parser = ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_seq_length", type=whole_number(1), default=4096)
    parser.add_argument(
        "--batch_size", type=whole_number(1), default=256, help="examples of a step"
    )
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.tokenizer)
    dataset = tokenize_dataset(args.data, tokenizer, args.max_seq_length)

    row_length = args.max_seq_length
    rows: list[np.ndarray] = []  # of each step, for each order
    fewest = 0
    for seed in range(ORDERS):
        data = training_data(dataset, row_length, args.batch_size, 1, seed)
        steps = [dataset.lengths[examples] for examples in data.epoch_examples()]
        rows.append(np.array([len(pack(lengths, row_length)) for lengths in steps]))
        fewest += sum(-(-int(lengths.sum()) // row_length) for lengths in steps)
    total = int(np.sum(rows))
    print(
        f"{total} rows of {row_length} in {ORDERS} epochs, {total / fewest - 1:.2%} more than the "
        f"fewest conceivable, {fewest}"
    )

    tokens = int(dataset.lengths.sum())
    print("rows per micro-batch | row length | padding | padding with full-length rows")
    for rows_per_batch in (1, 2, 4, 8, 16):
        data = training_data(dataset, row_length, args.batch_size, rows_per_batch)
        padding = data.first_epoch_padding_share()
        places = (-(-rows[0] // rows_per_batch)).sum() * rows_per_batch * row_length
        print(
            f"{rows_per_batch:20} | {data.row_length:10} | {padding:7.2%} | "
            f"{1 - tokens / places:7.2%}"
        )


def training_data(
    dataset: TokenizedDataset,
    max_seq_length: int,
    batch_size: int,
    rows_per_batch: int,
    seed: int = 0,
) -> TrainingData:
    """Returns one packed epoch, in the order of `seed`."""
    return TrainingData(
        dataset,
        batch_size=batch_size,
        epochs=1,
        max_steps=None,
        seed=seed,
        max_seq_length=max_seq_length,
        pack=True,
        rows_per_batch=rows_per_batch,
        loss_normalization="tokens",
        microbatch_examples=4,
        pad_id=0,
    )


if __name__ == "__main__":
    run_command(main)
