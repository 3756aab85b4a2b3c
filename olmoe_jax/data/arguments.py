"""Flags of the commands that read rows."""

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from olmoe_jax.data.chat import BOOKKEEPING
from olmoe_jax.data.formats import RowRules, row_rules
from olmoe_jax.errors import UserError
from olmoe_jax.files import expand
from olmoe_jax.sources import Source, parse, reads
from olmoe_jax.sources import expand as expand_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FIELDS = "hub_config|split|train_on|ignore_fields|max_seq_length"
"""The fields of `DataOptions` that messages about rows name, and that these commands have."""


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Names the flag, --split, where a message of the block names a run's field, data.split."""
    try:
        yield
    except UserError as error:
        named = re.sub(rf"(?<![\w/.])data\.(?=({_FIELDS})\b(?![/.]))", "--", str(error))
        raise UserError(named) from None


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which rows are read and how they become text."""
    parser.add_argument(
        "--data",
        required=True,
        type=expand_sources,
        metavar="SOURCES",
        help=".jsonl (.gz, .zst), .json, .parquet or .csv file, a folder or a pattern of them, "
        "OWNER/NAME or OWNER/NAME:FILE on the hub; several as in data.train_path of a run",
    )
    parser.add_argument("--hub_config", metavar="NAME", help="as data.hub_config of a run")
    parser.add_argument("--split", metavar="NAME", help="as data.split of a run; default: train")
    add_chat_template(parser, "auto", "as data.chat_template of a run")
    parser.add_argument("--train_on", choices=["answers", "last_answer", "all"], default="answers")
    parser.add_argument(
        "--ignore_fields", default=BOOKKEEPING, metavar="NAMES", help=f"default: {BOOKKEEPING}"
    )


def sources_of(args: argparse.Namespace) -> tuple[Source, ...]:
    """Returns the sources that the flags name.

    Raises:
      UserError: as for `parse`, or no source reads a flag.
    """
    for flag, setting in (("hub_config", "config"), ("split", "split")):
        value = getattr(args, flag)
        if value and not reads(parse(args.data), setting):
            raise UserError(
                f"--{flag}={value}: only read of a data set OWNER/NAME on the hub that has no "
                f"{setting}= of its own; leave it out"
            )
    return parse(args.data, args.hub_config, args.split)


def add_chat_template(parser: Any, default: str | None, help: str) -> None:
    """Adds --chat_template to a parser, or to a group of its arguments."""
    parser.add_argument(
        "--chat_template", default=default, type=expand, metavar="auto|none|FILE", help=help
    )


def rules_of(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> RowRules:
    """Returns what the flags say."""
    template = None if args.chat_template == "none" else args.chat_template
    return row_rules(tokenizer, template, args.train_on, args.ignore_fields)
