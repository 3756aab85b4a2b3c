"""The command `python -m olmoe_jax.data preview`, which shows a data file as the model sees it."""

import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax.checkpoints.directory import new_file
from olmoe_jax.data.arguments import add_row_arguments, naming_flags, rules_of, sources_of
from olmoe_jax.data.counts import Counts, source_table
from olmoe_jax.data.formats import EncodedRow, encode_batch
from olmoe_jax.data.page import page
from olmoe_jax.data.reading import check_distinct, read_source
from olmoe_jax.data.tokenized import format_row_at
from olmoe_jax.data.tokenizer import load_tokenizer
from olmoe_jax.errors import ArgumentParser, printable, run_command, unescaped, whole_number
from olmoe_jax.files import PATH_OR_ID, user_path
from olmoe_jax.sources import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNTRAINED_LABEL = -100
_COLOUR = ("\033[32m", "\033[0m")
_PLAIN_MARKS = ("⟦", "⟧")
_EXAMPLE = """example:
  python -m olmoe_jax.data preview --data train.jsonl --tokenizer allenai/OLMoE-1B-7B-0125 \\
      --max_seq_length 4096 --rows 3
"""


@naming_flags()
def main(argv: Sequence[str]) -> None:
    """Prints the rows that the arguments ask for.

    Raises:
      UserError: the usage or the data is bad.
    """
    args = _parser().parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    rules = rules_of(args, tokenizer)
    sources = sources_of(args)
    check_distinct(sources)
    found: list[list[EncodedRow]] = []  # the examples of each source
    for source in sources:
        found.append([])
        for place, row in itertools.islice(read_source(source), args.rows):
            text = format_row_at(place, row, tokenizer.eos_token, rules)
            found[-1] += encode_batch([text], tokenizer, args.max_seq_length)
    examples = [*itertools.chain(*found)]
    if args.json:
        for example in examples:
            print(_as_json(example))
    else:
        counts = [Counts.of(of_source, rules.ends(tokenizer.eos_token_id)) for of_source in found]
        summary = [_summary(examples, sum(counts, Counts()), args.max_seq_length)]
        table = source_table(sources, counts)
        if any(example.templated for example in examples):
            summary.append(f"conversations: {rules.describe()}")
        names = [
            f"row {number}" if len(sources) == 1 else f"row {number} of {short(str(source))}"
            for source, of_source in zip(sources, found, strict=True)
            for number in range(1, len(of_source) + 1)
        ]
        if args.html:
            with new_file(args.html) as file:
                text = page(names, examples, tokenizer, summary, table)
                file.write_text(text, encoding="utf-8")
        else:
            _print_text(names, examples, tokenizer)
        print("\n".join([summary[0], *table, *summary[1:]]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m olmoe_jax.data")
    commands = parser.add_subparsers(dest="command", required=True)
    preview = commands.add_parser(
        "preview",
        help="show rows as the model sees them, with the part that trains marked",
        description="Shows rows of a data set as the model sees them. The part that trains is "
        "coloured on a terminal and put between ⟦ and ⟧ elsewhere.",
        epilog=_EXAMPLE,
    )
    preview.add_argument("--tokenizer", required=True, **PATH_OR_ID)
    preview.add_argument("--max_seq_length", required=True, type=whole_number(1), metavar="N")
    preview.add_argument(
        "--rows", type=whole_number(1), default=5, metavar="N", help="of each source; default: 5"
    )
    add_row_arguments(preview)
    instead = preview.add_mutually_exclusive_group()
    instead.add_argument(
        "--html", type=user_path, metavar="FILE", help="write a page of coloured rows instead"
    )
    instead.add_argument(
        "--json",
        action="store_true",
        help="one JSON line a row: kept, input_ids, trains (what the loss covers), labels (the "
        "reference's, without tokens that hold the end of a prompt and the start of an answer)",
    )
    return parser


def _as_json(example: EncodedRow) -> str:
    as_reference = example.in_loss & ~example.straddling
    labels = np.where(as_reference, example.tokens, _UNTRAINED_LABEL)
    return json.dumps(
        {
            "kept": bool(example.in_loss.any()),
            "input_ids": example.tokens.tolist(),
            "labels": labels.tolist(),
            "trains": example.in_loss.tolist(),
        }
    )


def _print_text(
    names: Sequence[str], examples: Sequence[EncodedRow], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    marks = _COLOUR if sys.stdout.isatty() else _PLAIN_MARKS
    for name, example in zip(names, examples, strict=True):
        count = int(example.in_loss.sum())
        fate = f"{count} to train on" if count else "dropped: none to train on"
        print(f"--- {name}: {len(example.tokens)} tokens, {fate}")
        print(_marked_text(example, tokenizer, marks), file=unescaped(sys.stdout))


def _summary(examples: Sequence[EncodedRow], counts: Counts, max_seq_length: int) -> str:
    longest = max((len(e.tokens) for e in examples if e.in_loss.any()), default=0)
    return (
        f"rows: {counts.describe(max_seq_length)}; {counts.kept} kept: {counts.tokens:,} tokens "
        f"({counts.trained:,} train), longest {longest:,}"
    )


def _marked_text(
    example: EncodedRow, tokenizer: "PreTrainedTokenizerBase", marks: tuple[str, str]
) -> str:
    """Returns the printable text of an example with `marks` around each part that trains."""
    changes = np.flatnonzero(np.diff(example.in_loss)) + 1
    pieces = []
    for span in np.split(np.arange(len(example.tokens)), changes):
        text = printable(tokenizer.decode(example.tokens[span].tolist()))
        pieces.append(f"{marks[0]}{text}{marks[1]}" if example.in_loss[span].any() else text)
    return "".join(pieces)


if __name__ == "__main__":
    run_command(main)
