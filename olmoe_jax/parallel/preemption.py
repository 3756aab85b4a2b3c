"""SIGTERM stops a run after a step that all its processes agree on."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.parallel.sharding import BATCH


class Preemption:
    """Catches SIGTERM while it is entered.

    One process stops after the step in which the signal came. Several ask each other in every
    step, with one small all-reduce behind the update that nobody waits for: its answer is read
    when the step is reported. Whichever process got the signal, all stop after the same step.
    """

    def __init__(self, mesh: Mesh):
        self._requested, self._agreed = False, False
        self._several = jax.process_count() > 1
        self._flags = NamedSharding(mesh, BATCH)
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

    def __enter__(self) -> "Preemption":
        self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_) -> None:
        # None: a handler that was not set from Python, which cannot be put back.
        signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _request(self, *_) -> None:
        self._requested = True

    @property
    def stop(self) -> bool:
        """Whether to save and stop now."""
        return self._agreed if self._several else self._requested

    def ask(self) -> jax.Array | bool:
        """Starts asking all processes; call it once a step, after the update."""
        if not self._several:
            return self._requested
        own = np.full(jax.local_device_count(), self._requested)
        return self._any(jax.make_array_from_process_local_data(self._flags, own))

    def settle(self, answer: jax.Array | bool) -> None:
        """Takes the answer to `ask`; call it when the step is reported."""
        self._agreed |= bool(answer)
