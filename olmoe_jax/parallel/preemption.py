"""SIGTERM stops a run after a step that all its processes agree on."""

import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.parallel.sharding import BATCH


class Preemption:
    """A context that catches SIGTERM, in the main thread.

    A single process stops after the step in which the signal came. Several processes ask each other
    in every step with one small all-reduce behind the update. Nobody waits for this all-reduce: the
    answer is read when the step is reported. So all processes stop after the same step, whichever
    got the signal.

    jax's preemption service (`multihost_utils.reached_preemption_sync_point`) finds such a step
    too, but catches SIGTERM from `jax.distributed.initialize()` to the end of the process: a run
    that tokenises or exports would ignore the signal.
    """

    def __init__(self, mesh: Mesh):
        self._requested, self._agreed = False, False
        self._several = jax.process_count() > 1
        self._flags = NamedSharding(mesh, BATCH)
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

    def __enter__(self) -> "Preemption":
        # Python sets handlers in the main thread alone. In another thread, SIGTERM is the business
        # of the program that runs there.
        self._catches = threading.current_thread() is threading.main_thread()
        if self._catches:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._catches:
            # None: a handler that was not set from Python and cannot be put back.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    @property
    def stop(self) -> bool:
        """True if the run is to save and stop now."""
        return self._agreed if self._several else self._requested

    def ask(self) -> jax.Array | bool:
        """Starts asking all processes; returns what `settle` takes. Call it after each update."""
        if not self._several:
            return self._requested
        own = np.full(jax.local_device_count(), self._requested)
        return self._any(jax.make_array_from_process_local_data(self._flags, own))

    def settle(self, answer: jax.Array | bool) -> None:
        """Reads the answer to `ask`. Call it when the step is reported."""
        self._agreed |= bool(answer)
