"""Time of tokenising: python -m benchmarks.tokenization --tokenizer DIR --text FILE

Makes chats of the text's words, 30 to a turn, and compares with the same words in chats of two
turns. Prints the tokens, the seconds of all cores, the ratio of the seconds a token, and the
seconds of the main thread and the busiest other one: what it takes where each has a core of its
own, whatever else runs on the machine. The tokenizer's threads are as many as RAYON_NUM_THREADS
says, or as there are cores. --data FILE measures rows of one's own instead.
"""

import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import machine
from olmoe_jax.data import load_tokenizer, tokenize_dataset
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.files import read_text, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPES = ((6000, 2), (2000, 6), (100, 120), (10, 1200))
"""(chats, turns) of data sets with 12,000 turns each."""
WORDS = 30
LENGTH = 1 << 17
"""Tokens at which a chat is cut: none is."""


def main(arguments: Sequence[str]) -> None:
    """Prints the table. Raises `UserError` for bad usage."""
    parser = ArgumentParser(prog="python -m benchmarks.tokenization", description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=user_path)
    what.add_argument("--data")
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.tokenizer)
    print(machine())
    with tempfile.TemporaryDirectory() as path:
        os.environ["OLMOE_JAX_CACHE"] = path
        if args.data:
            tokens, seconds, critical = measure(args.data, tokenizer)
            print(f"{tokens:,} tokens, {seconds:.2f} s, with a core for each thread {critical:.2f}")
            return
        words = read_text(args.text).split()
        if len(words) <= WORDS:
            raise UserError(f"--text={args.text}: write a text of more than {WORDS} words")
        print("chats | turns |    tokens | seconds | a token, over the first row | a core each")
        first = None
        for chats, turns in SHAPES:
            file = Path(path) / f"{turns}.jsonl"
            write_chats(file, words, chats, turns)
            tokens, seconds, critical = measure(str(file), tokenizer)
            first = first or seconds / tokens
            ratio = seconds / tokens / first
            print(
                f"{chats:5} | {turns:5} | {tokens:9,} | {seconds:7.2f} | {ratio:27.2f} | "
                f"{critical:6.2f}"
            )


def measure(data: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, float, float]:
    """Returns tokens, seconds of all threads, and seconds of the main and the busiest other one."""
    before = _seconds_of_threads()
    tokens = len(tokenize_dataset(data, tokenizer, LENGTH).tokens)
    spent = {n: end - before.get(n, 0) for n, end in _seconds_of_threads().items()}
    main_thread = spent.pop(os.getpid())
    return tokens, main_thread + sum(spent.values()), main_thread + max(spent.values(), default=0)


def _seconds_of_threads() -> dict[int, float]:
    """Returns {thread id: seconds on a core} of this process."""
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in Path("/proc/self/task").iterdir()
    }


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
