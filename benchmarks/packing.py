"""Padding share of packed rows: python -m benchmarks.packing --data FILE --tokenizer DIR

Prints, for micro-batches of 1, 2, 4, 8 and 16 rows, the row length that the pipeline chooses and
the share of padding over one epoch (empty rows included), beside rows of the full length.
"""

import argparse
from unittest import mock

from olmoe_jax.data import TrainingData, load_tokenizer, pipeline, tokenize_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_seq_length", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=256)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    dataset = tokenize_dataset(args.data, tokenizer, args.max_seq_length, None)

    def share(rows: int) -> tuple[int, float]:
        data = TrainingData(
            dataset,
            batch_size=args.batch_size,
            epochs=1,
            max_steps=None,
            seed=0,
            max_seq_length=args.max_seq_length,
            pack=True,
            rows_per_batch=rows,
            loss_normalization="tokens",
            microbatch_examples=4,
            pad_id=tokenizer.pad_token_id or 0,
        )
        return data.row_length, data.first_epoch_padding_share()

    print("rows per micro-batch | row length | padding | padding with full-length rows")
    for rows in (1, 2, 4, 8, 16):
        length, padding = share(rows)
        with mock.patch.object(pipeline, "_ROW_MULTIPLE", args.max_seq_length):
            _, full = share(rows)
        print(f"{rows:20} | {length:10} | {padding:7.2%} | {full:7.2%}")


if __name__ == "__main__":
    main()
