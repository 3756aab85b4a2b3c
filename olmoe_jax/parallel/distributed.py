"""Several processes as one run: joining, waiting for each other, and ending together.

jax's coordination service, which process 0 hosts, connects them. A thread in each process beats
and listens: when a process fails, it says so there and the others end with its exit code; when one
falls silent, process 0 says so. jax's own heartbeat, which takes a little longer, sees the death of
process 0. For a single process nothing of this is imported or started.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from olmoe_jax.errors import UserError
from olmoe_jax.parallel.cluster import Cluster, find_cluster

BARRIER_TIMEOUT = 3600
"""Seconds to wait for another process that lives: it may be reading or exporting much."""

_JOIN_TIMEOUT = 300
_BEAT = 1.0
_PART_TIMEOUT = 15
_FAILURE = "olmoe_jax/failure"
_ALIVE = "olmoe_jax/alive/"
_PARTED = "olmoe_jax/parted/"
_numbers = itertools.count()
_ending = threading.RLock()  # the main thread says why before the watch, which saw it too, exits


@contextlib.contextmanager
def joined(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Makes this process one of a run's, where its flags or environment say so.

    Yields the arguments without the cluster's flags. An error inside ends all processes: its line
    is printed once, and they exit with the same code (not 0).

    Raises:
      UserError: a wrong or half configuration, or no contact with the others.
    """
    if {"--help", "-h"} & {*arguments}:
        yield list(arguments)
        return
    cluster, rest = find_cluster(arguments, os.environ)
    if cluster is None:
        yield rest
        return
    _connect(cluster)
    watch = _Watch(cluster)
    watch.start()
    try:
        _check_devices(cluster)
        yield rest
        barrier("the end")
    except BaseException as error:
        _fail(error)
    watch.stop()
    import jax

    jax.distributed.shutdown()


def is_writer() -> bool:
    """Whether this process writes what the run writes once: logs, metrics, exports."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here; they must come in the same order.

    Raises:
      UserError: one did not come within BARRIER_TIMEOUT.
    """
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(f"olmoe_jax/{next(_numbers)}/{name}", BARRIER_TIMEOUT * 1000)
    except RuntimeError as error:
        if "timed out" in str(error) or "DEADLINE" in str(error):
            raise UserError(
                f"waited {BARRIER_TIMEOUT} s for the other processes ({name}); see what they do"
            ) from error
        raise


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """Process 0 does what is inside, then the others: what it made they find."""
    if not is_writer():
        barrier(name)
    yield
    if is_writer():
        barrier(name)


def from_writer(name: str, value: str) -> str:
    """Process 0's value, on every process; each name once."""
    client = _client()
    if client is None:
        return value
    if is_writer():
        client.key_value_set(f"olmoe_jax/value/{name}", value, allow_overwrite=True)
    barrier(name)
    return client.key_value_try_get(f"olmoe_jax/value/{name}")


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective or a barrier failed for want of another process."""
    words = ("Gloo", "gloo", "NCCL", "oordination", "heartbeat")
    return _client() is not None and any(word in str(error) for word in words)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _client():
    """jax's client of the coordination service, which has barriers with a timeout; or None."""
    state = sys.modules.get("jax._src.distributed")
    return state.global_state.client if state else None


def _connect(cluster: Cluster) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # SIGTERM is ours: see training.preemption.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_TIMEOUT,
            # Ours comes first: it can say in a line what happened.
            heartbeat_timeout_seconds=cluster.heartbeat_timeout + 10,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {cluster.process_id} of {cluster.num_processes} cannot join at "
            f"{cluster.coordinator_address} ({_one_line(error)[:200]}); all processes must "
            f"start within {_JOIN_TIMEOUT} s, each with its own process_id, and reach that host "
            "and port"
        ) from error


def _check_devices(cluster: Cluster) -> None:
    import jax

    own = jax.local_device_count()
    if own * cluster.num_processes != jax.device_count():
        raise UserError(
            f"process {cluster.process_id} has {own} devices, which is not a share of the "
            f"{jax.device_count()} of all {cluster.num_processes} processes; give each equally many"
        )


class _Watch(threading.Thread):
    """Beats, listens for failures, and on process 0 notices who has fallen silent."""

    def __init__(self, cluster: Cluster):
        super().__init__(name="olmoe_jax-watch", daemon=True)
        self._cluster, self._end, self._client = cluster, threading.Event(), _client()
        self._last = {}  # process: (its last beat, when that was first seen)

    def run(self) -> None:
        for beat in itertools.count():
            with contextlib.suppress(RuntimeError):  # the service is gone: jax ends the process
                self._tick(beat)
            if self._end.wait(_BEAT):
                return

    def stop(self) -> None:
        self._end.set()
        self.join()

    def _tick(self, beat: int) -> None:
        own = f"{_ALIVE}{self._cluster.process_id}"
        self._client.key_value_set(own, str(beat), allow_overwrite=True)
        if failure := _failure(self._client):
            _exit(int(failure))
        if self._cluster.process_id == 0:
            self._look_for_silence()

    def _look_for_silence(self) -> None:
        now, limit = time.monotonic(), self._cluster.heartbeat_timeout
        beats = dict(self._client.key_value_dir_get(_ALIVE))
        for process in range(self._cluster.num_processes):
            beat = beats.get(f"{_ALIVE}{process}")
            if process not in self._last or self._last[process][0] != beat:
                self._last[process] = beat, now
            elif now - self._last[process][1] > limit:
                _end_all(1, f"error: {_lost(f'process {process} has been silent for {limit} s')}")


def _fail(error: BaseException) -> NoReturn:
    """Ends all processes for this error of one of them."""
    if isinstance(error, SystemExit):
        _end_all(error.code if isinstance(error.code, int) else 1, "")
    if isinstance(error, KeyboardInterrupt):
        _end_all(130, "interrupted")
    if isinstance(error, UserError):
        _end_all(2, f"error: {_one_line(error)}")
    if is_lost_contact(error):
        # Most often another process failed first, and is about to say why.
        deadline = time.monotonic() + 5 * _BEAT
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                if failure := _failure(_client()):
                    _exit(int(failure))
            time.sleep(_BEAT / 5)
        _end_all(1, f"error: {_lost(f'a process does not answer ({_one_line(error)[:200]})')}")
    _end_all(1, "".join(traceback.format_exception(error)).rstrip())


def _lost(what: str) -> str:
    return f"{what}; look at its output; the same command continues from the last checkpoint"


def _end_all(code: int, message: str) -> NoReturn:
    """Prints the message, unless another process was first, and exits; the others follow."""
    with _ending:
        with contextlib.suppress(RuntimeError):
            client = _client()
            try:
                client.key_value_set(_FAILURE, str(code))
            except RuntimeError:
                if failure := _failure(client):
                    _exit(int(failure))
        if message:
            print(message, file=sys.stderr, flush=True)
        _exit(code)


def _failure(client) -> str | None:
    try:
        return client.key_value_try_get(_FAILURE)
    except RuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _exit(code: int) -> NoReturn:
    """Past the normal exit, which would wait for processes that are no more."""
    with _ending:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            _part()
        os._exit(code)


def _part() -> None:
    """Process 0 goes last: the service it hosts tells the others, and jax aborts without it."""
    state = sys.modules["jax._src.distributed"].global_state
    if state.process_id != 0:
        state.client.key_value_set(f"{_PARTED}{state.process_id}", "", allow_overwrite=True)
        return
    deadline = time.monotonic() + _PART_TIMEOUT
    while time.monotonic() < deadline:
        if len(state.client.key_value_dir_get(_PARTED)) == state.num_processes - 1:
            break
        time.sleep(_BEAT / 10)
    time.sleep(_BEAT)
