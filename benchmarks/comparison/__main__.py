"""All methods on small models whose pretraining is known: trained, fine-tuned, and compared.

    python -m benchmarks.comparison --output runs/comparison --quick

Bases of about 10M parameters (32 experts, K per token) are pretrained on twelve generated tasks and
fine-tuned on four others with each method. Every run is a row of OUTPUT/results.jsonl: the same
command continues after an interruption. OUTPUT gets table.md, rates.md, targets.md, effects.md,
base.md and comparison.svg; --report DIR only writes these, from OUTPUT's results, to DIR.
"""

import argparse
import functools
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.comparison.base import write_inputs
from benchmarks.comparison.cells import QUICK, Cell, Study, missing, read
from benchmarks.comparison.report import write_report
from benchmarks.comparison.runs import base_file, keep_study, pretrain, run_cells
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.parallel.compilation import keep_programs


def main(arguments: Sequence[str]) -> None:
    """Runs what has no result yet, then reports."""
    args = parse(arguments)
    keep_programs()
    study = QUICK if args.quick else Study()
    if args.base is not None:
        pretrain(args.output, args.base, study)
    elif args.group is not None:
        stage, number = args.group
        group = study.stages()[stage][number]
        run_cells(args.output, f"{stage}_{number}", missing(group, read(args.output)), study)
    else:
        if args.report is None:
            run_all(args.output, study, args.quick, args.jobs)
        write_report(args.output, args.report or args.output, study)


def run_all(output: Path, study: Study, quick: bool, jobs: int) -> None:
    """Makes the inputs, then pretrains each base and runs each group, as far as it is missing."""
    keep_study(output, study)
    write_inputs(output / "inputs", study.pretrain_rows)
    for number, groups in enumerate(study.stages()):
        left = [i for i, group in enumerate(groups) if missing(group, read(output))]
        for k in dict.fromkeys(groups[i][0].experts_per_token for i in left):
            if not base_file(output, k).exists():
                in_process(output, quick, f"--base={k}")
        with on_shares_of_the_cores(jobs) as pool:
            run = functools.partial(run_group, output, quick, number)
            list(pool.map(run, left, [groups[i][0] for i in left]))  # a group that fails ends it


def run_group(output: Path, quick: bool, stage: int, number: int, first: Cell) -> None:
    """Runs what is missing of a group, whose first run is `first`."""
    print(f"{first.method}, K = {first.experts_per_token}: {stage}/{number}", flush=True)
    in_process(output, quick, "--group", f"{stage}", f"{number}")


def on_shares_of_the_cores(jobs: int) -> ThreadPoolExecutor:
    """Returns a pool of threads; what each of them starts runs on its own share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    return ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get()))


def in_process(output: Path, quick: bool, *work: str) -> None:
    """Does a part of the work in a process of its own, whose peak memory is that of one method."""
    command = [sys.executable, "-m", "benchmarks.comparison", f"--output={output}", *work]
    if code := subprocess.run([*command, *["--quick"] * quick], check=False).returncode:
        sys.exit(code)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--output", type=user_path, required=True)
    parser.add_argument("--quick", action="store_true", help="one target, two methods, two seeds")
    parser.add_argument(
        "--jobs", type=whole_number(1), default=1, help="runs side by side, on as many cores"
    )
    parser.add_argument(
        "--report", type=user_path, metavar="DIR", help="only report OUTPUT's results, in DIR"
    )
    parser.add_argument("--base", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
