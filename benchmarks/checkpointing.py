"""The cost of a checkpoint to the steps around it: python -m benchmarks.checkpointing

The steps are AdamW updates on a few random tokens: the size of the state matters, the FLOPs do
not. A save starts in the background, as in a run, and steps go on until it is complete. Then the
same state is saved and waited for, in turns with the checksums of its files and without.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.machine import machine
from benchmarks.memory import GIB
from benchmarks.shapes import shape_of
from benchmarks.step import build, make_parser, random_batch
from benchmarks.timing import timed
from olmoe_jax.checkpoints import checksums
from olmoe_jax.errors import UserError, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.cpu import restart_with_huge_pages
from olmoe_jax.training.checkpoint import Checkpointer
from olmoe_jax.training.program import Program


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    parser.prog, parser.description = "python -m benchmarks.checkpointing", __doc__
    parser.set_defaults(rows=1, length=32, what="update")
    parser.add_argument("--saves", type=whole_number(1), default=3, help="saves of each kind")
    parser.add_argument(
        "--steps", type=whole_number(1), default=10, help="timed steps without a save"
    )
    parser.add_argument(
        "--output", type=user_path, help="directory to write in; default: a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    if args.what != "update":
        raise UserError(f"--what={args.what}: write update, which has a state to save")
    with tempfile.TemporaryDirectory(dir=args.output) as directory:
        result = measure(args, Path(directory))
    print(json.dumps(result) if args.json else report(result))


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Returns the seconds of steps and of saves, each kind of save `args.saves` times."""
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        run = _Run(build(args, shape_of(args), mesh)[0], args, directory)
        run.step()  # compiles
        alone = [timed(run.step)[0] for _ in range(args.steps)]
        background = [run.save_behind_steps() for _ in range(args.saves)]
        waited = [(timed(run.save_and_wait)[0], run.save_unlisted()) for _ in range(args.saves)]
    state = sum(array.nbytes for array in jax.tree.leaves(run.state))
    run.checkpoints.close()
    median = statistics.median
    return {
        "state_gib": state / GIB,
        "step_seconds": median(alone),
        "longest_step_seconds": max(alone),
        # Medians over the saves: how long `save` held the steps up, the step after it (with the
        # call), the steps until the save was complete, and the time until then.
        "blocked_seconds": median(blocked for blocked, _, _ in background),
        "saving_step_seconds": median(blocked + steps[0] for blocked, steps, _ in background),
        "step_during_save_seconds": median(median(steps) for _, steps, _ in background),
        "complete_seconds": median(complete for _, _, complete in background),
        "waited_seconds": median(listed for listed, _ in waited),
        "waited_without_checksums_seconds": median(unlisted for _, unlisted in waited),
        "checksum_seconds": median(run.checksum_seconds),
        "machine": machine(),
    }


class _Run:
    """A run that can step and save."""

    def __init__(self, program: Program, args: argparse.Namespace, directory: Path):
        self.program, self.state = program, program.state
        self.batch = program.to_devices(random_batch(shape_of(args)))
        self.checkpoints = Checkpointer(directory, keep=1, identity={})
        self.saves = 0
        self.checksum_seconds: list[float] = []
        self._write_checksums = checksums.write
        checksums.write = self._timed_checksums

    def _timed_checksums(self, *arguments: Any, **keywords: Any) -> None:
        start = time.perf_counter()
        self._write_checksums(*arguments, **keywords)
        self.checksum_seconds.append(time.perf_counter() - start)

    def step(self) -> Any:
        program = self.program
        sums = program.accumulate(
            self.state.parameters,
            program.frozen,
            program.zero_sums(),
            self.batch,
            np.zeros(2, np.uint32),
        )
        self.state, metrics = program.update(self.state, sums)
        return self.state, metrics

    def save(self) -> None:
        self.saves += 1
        self.checkpoints.save(self.saves, self.state, {}, {}, {}, None)

    def save_and_wait(self) -> None:
        self.save()
        self.checkpoints.wait()

    def save_unlisted(self) -> float:
        """Returns the seconds of a save that is waited for and writes no checksums."""
        with mock.patch.multiple(checksums, write=mock.DEFAULT, HashAhead=mock.DEFAULT):
            return timed(self.save_and_wait)[0]

    def save_behind_steps(self) -> tuple[float, list[float], float]:
        """Saves in the background and steps until the save is complete.

        Returns:
          The seconds of the call of `save`, of each step, and until the save was complete.
        """
        started = time.perf_counter()
        blocked = timed(self.save)[0]
        steps = [timed(self.step)[0]]
        while self.checkpoints.is_saving():
            steps.append(timed(self.step)[0])
        return blocked, steps, time.perf_counter() - started


def report(result: dict[str, Any]) -> str:
    """Returns the result as text for a person."""
    step, blocked = result["step_seconds"], result["blocked_seconds"]
    complete, waited = result["complete_seconds"], result["waited_seconds"]
    unlisted, checks = result["waited_without_checksums_seconds"], result["checksum_seconds"]
    return f"""machine              {result["machine"]}
state                {result["state_gib"]:.2f} GiB
step without a save  {step:.3f} s median, {result["longest_step_seconds"] / step:.2f}x at most
step with its start  {result["saving_step_seconds"] / step:.2f}x
steps until its end  {result["step_during_save_seconds"] / step:.2f}x
blocked by `save`    {blocked:.3f} s: {blocked / complete:.1%} of the {complete:.2f} s that it takes
synchronous save     {waited:.2f} s: {waited / blocked:.1f}x as long as that
without checksums    {unlisted / waited:.2f}x
checksums            {checks:.3f} s: {checks / waited:.1%} of the synchronous save"""


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
