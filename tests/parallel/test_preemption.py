"""SIGTERM within a run."""

import os
import signal
import threading

from olmoe_jax.parallel.preemption import Preemption
from olmoe_jax.parallel.sharding import make_mesh


def test_sigterm_stops_the_run():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(make_mesh()) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_sigterm_to_its_program():
    """There, Python sets no handlers."""
    handlers = []

    def run():
        with Preemption(make_mesh()) as preemption:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert not preemption.stop
        handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)] * 2
