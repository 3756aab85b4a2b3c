"""Time from the command to a run's first step: python -m benchmarks.first_step

The run is the quickstart's, on tokens that are in the cache already. In turns, the compiled
programs are not kept, kept for the first time (cold), and there from an earlier start (warm).
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.root import ROOT


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__)
    parser.add_argument("--repeats", type=whole_number(1), default=1, help="starts of each kind")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        start(directory, keep=False)  # makes the data and their tokens
        seconds: dict[str, list[float]] = {"not kept": [], "cold": [], "warm": []}
        for _ in range(args.repeats):
            shutil.rmtree(directory / "cache" / "compiled", ignore_errors=True)
            seconds["not kept"].append(start(directory, keep=False))
            seconds["cold"].append(start(directory))
            seconds["warm"].append(start(directory))
    print(machine())
    whole = statistics.median(seconds["not kept"])
    for kind, times in seconds.items():
        each = ", ".join(f"{value:.1f}" for value in times)
        print(f"{kind:8} {statistics.median(times) / whole:.2f}x ({each} s)")


def start(directory: Path, keep: bool = True) -> float:
    """Starts a run in `directory`; returns the seconds until its first step is written."""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OLMOE_JAX_CACHE": str(directory / "cache"),
        "JAX_ENABLE_COMPILATION_CACHE": str(int(keep)),
    }
    command = [
        *(sys.executable, "-P", str(ROOT / "train.py")),
        *("--config", str(ROOT / "configs" / "quickstart.py")),
        f"--config.train.output_dir={directory / 'run'}",
    ]
    metrics = directory / "run" / "metrics.jsonl"
    begin = time.perf_counter()
    with (
        open(directory / "output", "w") as output,
        subprocess.Popen(
            command, cwd=directory, env=environment, stdout=output, stderr=output
        ) as process,
    ):
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        ended = process.poll()
        process.kill()
    if ended:
        raise UserError(f"the run failed: {(directory / 'output').read_text()[-500:]}")
    shutil.rmtree(directory / "run")
    return seconds


if __name__ == "__main__":
    run_command(main)
