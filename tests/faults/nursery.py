"""train.py in processes that start quickly: forked from one that has imported everything."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from olmoe_jax.errors import run_command


class Nursery:
    """Starts train.py as children of a process without a device: jax starts in each child."""

    def __init__(self, environment: dict[str, str]):
        self._context = multiprocessing.get_context("forkserver")
        tokenizers = "transformers.tokenization_utils_tokenizers"
        self._context.set_forkserver_preload(["train", "olmoe_jax.training.loop", tokenizers])
        with mock.patch.dict(os.environ, environment):
            first = self._context.Process(target=int)
            first.start()
            first.join()

    def start(self, arguments: Sequence[str], log: Path, hook: Callable[[], None] = int):
        """A started process that appends what it says to `log`; `hook` is called in it first."""
        process = self._context.Process(target=_train, args=(list(arguments), log, hook))
        process.start()
        return process

    def run(self, arguments: Sequence[str], log: Path, hook: Callable[[], None] = int):
        """(exit code, everything in the log) of a process that is waited for."""
        process = self.start(arguments, log, hook)
        process.join(900)
        process.kill()
        return process.exitcode, log.read_text()


def _train(arguments: list[str], log: Path, hook: Callable[[], None]) -> None:
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import train

    hook()
    sys.argv = ["train.py", *arguments]
    run_command(train.main)
