"""Time of tokenising: python -m benchmarks.tokenization --tokenizer DIR --text FILE

Makes chats of the text's words, 30 to a turn, and compares with the same words in chats of two
turns. Prints the tokens, the seconds of all cores and the ratio of the seconds a token.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from olmoe_jax.data import load_tokenizer, tokenize_dataset
from olmoe_jax.errors import ArgumentParser, run_command

SHAPES = ((6000, 2), (2000, 6), (100, 120), (10, 1200))
"""(chats, turns) of data sets with 12,000 turns each."""
WORDS = 30
LENGTH = 1 << 17
"""Tokens at which a chat is cut: none is."""


def main(arguments: Sequence[str]) -> None:
    """Prints the table. Raises `UserError` for bad usage."""
    parser = ArgumentParser(prog="python -m benchmarks.tokenization", description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True, type=Path)
    args = parser.parse_args(arguments)
    words = args.text.read_text(encoding="utf-8").split()
    tokenizer = load_tokenizer(args.tokenizer)
    print("chats | turns |    tokens | seconds | seconds a token over the first row's")
    first = None
    with tempfile.TemporaryDirectory() as path:
        os.environ["OLMOE_JAX_CACHE"] = path
        for chats, turns in SHAPES:
            file = Path(path) / f"{turns}.jsonl"
            write_chats(file, words, chats, turns)
            start = time.process_time()
            tokens = len(tokenize_dataset(str(file), tokenizer, LENGTH).tokens)
            seconds = time.process_time() - start
            first = first or seconds / tokens
            ratio = seconds / tokens / first
            print(f"{chats:5} | {turns:5} | {tokens:9,} | {seconds:7.2f} | {ratio:5.2f}")


def write_chats(file: Path, words: Sequence[str], chats: int, turns: int) -> None:
    """Writes chats whose turns are random pieces of the text."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(chats):
            starts = [draw.randrange(len(words) - WORDS) for _ in range(turns)]
            texts = [" ".join(words[start : start + WORDS]) for start in starts]
            messages = [
                {"role": ("user", "assistant")[index % 2], "content": text}
                for index, text in enumerate(texts)
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    run_command(main)
