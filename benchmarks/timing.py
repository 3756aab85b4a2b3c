"""Times functions and programs that take turns, so that a slow moment hits all of them."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from olmoe_jax.errors import UserError

T = TypeVar("T")


def use_cores(count: int) -> None:
    """Keeps this process and those that it starts on the first `count` cores.

    Raises:
      UserError: there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise UserError(f"--threads={count}: there are {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds until a call's result exists, and the CPU seconds of all threads."""
    import jax  # here, since a benchmark may set its environment first

    cpu, start = time.process_time(), time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start, time.process_time() - cpu


def in_turns(functions: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, np.ndarray]:
    """Calls the functions in turn, once to compile and then `runs` times.

    Returns:
      Name -> [runs, 2], `timed` of each run.
    """
    turns = [[timed(function) for function in functions.values()] for _ in range(runs + 1)]
    return dict(zip(functions, np.array(turns[1:]).swapaxes(0, 1), strict=True))


def in_rounds(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Runs each side once a round, and says before how busy the machine is.

    Returns:
      Name -> what the side returned in each round.
    """
    found: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            busy = f"{busy_cores():.1f} cores are busy with something else"
            print(f"round {turn + 1} of {rounds}: {name}; {busy}", file=sys.stderr)
            found[name].append(run())
    return found


def busy_cores(seconds: float = 0.5) -> float:
    """Returns the number of cores that other programs use while this one sleeps."""

    def work() -> tuple[int, int]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        ticks = list(map(int, fields))
        return sum(ticks[:8]), ticks[3] + ticks[4]  # all; idle or waiting for the disk

    total, idle = work()
    time.sleep(seconds)
    total, idle = work()[0] - total, work()[1] - idle
    return (1 - idle / max(1, total)) * (os.cpu_count() or 1)
