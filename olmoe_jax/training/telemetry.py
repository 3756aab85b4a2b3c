"""The time and memory of a run: parts of a step, time left, memory, a trace."""

import collections
import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

GIB = 2**30
WARM_UP_STEPS = 2
"""Steps after a start that are not traced: they compile."""
_COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that jax records after each compilation, also of a program kept on disk."""


class Breakdown:
    """Seconds that the host spends on each part of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block's time as `name`'s."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - started

    def take(self) -> dict[str, float]:
        """Returns TensorBoard's scalars of the time since the last call."""
        scalars = {f"time/{name}_seconds": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return scalars


class Pace:
    """Estimates how long a run's remaining steps take, evaluations and checkpoints included.

    Steps during which jax compiled do not count, nor does the first of a start: their time says
    nothing of the others. Call `close` at the end.
    """

    def __init__(self) -> None:
        self._ended: float | None = None  # when the step before ended
        self._compiled, self._seconds, self._steps = False, 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def step_ends(self, now: float) -> None:
        """Counts a step that ends `now`, in seconds of any clock."""
        if self._ended is not None and not self._compiled:
            self._seconds += now - self._ended
            self._steps += 1
        self._ended, self._compiled = now, False

    def left(self, steps: int) -> str | None:
        """Returns the time that `steps` more steps take, or None while no step counts."""
        if not self._steps:
            return None
        return str(datetime.timedelta(seconds=round(self._seconds / self._steps * steps)))

    def close(self) -> None:
        """Stops listening to jax."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self._compiled |= event == _COMPILED


def memory_scalars() -> dict[str, float]:
    """Returns TensorBoard's scalars of memory, GiB.

    They are this process's resident memory, its first device's memory in use, and the most that was
    in use there. CPUs do not tell the last two.
    """
    scalars = {}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        scalars["memory/host_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / GIB
    statistics = jax.local_devices()[0].memory_stats() or {}
    for name, key in {"device": "bytes_in_use", "device_peak": "peak_bytes_in_use"}.items():
        if key in statistics:
            scalars[f"memory/{name}_gib"] = statistics[key] / GIB
    return scalars


class Profile:
    """A `jax.profiler` trace of some steps after the first ones, which compile.

    Args:
      directory: TensorBoard's directory; its profile page, or Perfetto, shows the trace.
      steps: how many steps to trace; 0: no trace.
    """

    def __init__(self, directory: Path, steps: int):
        self._directory, self._steps = directory, steps
        self._begun = 0  # steps of this start
        self._tracing = False

    def next_step(self, pending: Any) -> str | None:
        """Begins or ends the trace when it is time; call it before each step.

        `pending` is what the step before computes. Returns a line when the trace is written.
        """
        self._begun += 1
        if not self._steps or self._begun not in (WARM_UP_STEPS + 1, self._end):
            return None
        jax.block_until_ready(pending)
        if self._begun == self._end:
            return self.close()
        jax.profiler.start_trace(str(self._directory))
        self._tracing = True
        return None

    def close(self) -> str | None:
        """Ends a trace that the run's end cuts short; returns a line that says where it is."""
        if not self._tracing:
            return None
        jax.profiler.stop_trace()
        self._tracing = False
        steps = min(self._begun - WARM_UP_STEPS, self._steps)
        return f"profile of {steps} steps: {self._directory}"

    @property
    def _end(self) -> int:
        return WARM_UP_STEPS + 1 + self._steps
