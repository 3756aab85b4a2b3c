"""Several processes as one run: joining, waiting for each other, and ending together.

jax's coordination service, which process 0 hosts, connects the processes. A process that fails
leaves its exit code there; a thread in each other process finds the code and exits with it. jax's
heartbeat ends the run when a process falls silent. For a single process nothing of this is
imported or started.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from olmoe_jax.errors import UserError, one_line, outcome, shorten
from olmoe_jax.parallel.cluster import Cluster, find_cluster

WAIT_TIMEOUT = 3600
"""Seconds to wait for another process that lives: it may be reading or exporting much."""

_JOIN_TIMEOUT = 300
_LEAVE_TIMEOUT = 10
_BEAT = 1.0
_FAILURE = "olmoe_jax/failure"
_numbers = itertools.count()  # all processes count alike
_ending = threading.RLock()  # the main thread says why before the watching thread may exit


@contextlib.contextmanager
def joined(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Makes this process one of a run's processes, if its flags or environment say so.

    Yields the arguments without the cluster's flags. An error inside ends all processes: one of
    them prints the error's line, and all exit with the same code (not 0).

    Raises:
      UserError: a wrong or incomplete configuration, or no contact with the others.
    """
    if {"--help", "-h"} & {*arguments}:
        yield list(arguments)
        return
    cluster, rest = find_cluster(arguments, os.environ)
    if cluster is None or not _connect(cluster):
        yield rest
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="olmoe_jax-watch", daemon=True)
    watch.start()
    try:
        _check_devices()
        yield rest
        barrier("the end")
    except BaseException as error:
        _fail(error)
    ended.set()
    watch.join()
    import jax

    jax.distributed.shutdown()


def is_writer() -> bool:
    """Returns whether this process writes what the run writes once: logs, metrics, exports."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here. All must call the barriers in the same order.

    Raises:
      UserError: a process did not come within WAIT_TIMEOUT.
    """
    client = _client()
    if client is not None:
        with _one_line_timeout(name):
            client.wait_at_barrier(_numbered(name), WAIT_TIMEOUT * 1000)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """Runs the block on process 0, then on the others, which find what process 0 made."""
    if not is_writer():
        barrier(name)
    yield
    if is_writer():
        barrier(name)


def from_writer(name: str, value: str) -> str:
    """Returns process 0's value on every process; see `values`."""
    return values(name, value)[0]


def values(name: str, value: str) -> list[str]:
    """Returns the values of all processes, on every process.

    Raises:
      UserError: a process did not come within WAIT_TIMEOUT.
    """
    client = _client()
    if client is None:
        return [value]
    import jax

    key = _numbered(name)
    client.key_value_set(f"{key}/{jax.process_index()}", value)
    with _one_line_timeout(name):
        return [
            client.blocking_key_value_get(f"{key}/{process}", WAIT_TIMEOUT * 1000)
            for process in range(jax.process_count())
        ]


def is_lost_contact(error: BaseException) -> bool:
    """Returns whether a collective or a barrier failed because another process is gone."""
    words = ("Gloo", "gloo", "NCCL", "oordination", "heartbeat")
    return _client() is not None and any(word in str(error) for word in words)


def _reason(error: BaseException) -> str:
    return shorten(one_line(str(error)), 200)


def _numbered(name: str) -> str:
    return f"olmoe_jax/{next(_numbers)}/{name}"


@contextlib.contextmanager
def _one_line_timeout(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "timed out" not in str(error) and "DEADLINE" not in str(error):
            raise
        raise UserError(
            f"waited {WAIT_TIMEOUT} s for the other processes ({name}); see what they do"
        ) from error


def _client() -> Any:
    """Returns jax's client of the coordination service; None for a process alone.

    jax has no public name for this client. `multihost_utils.sync_global_devices` runs a collective
    on the devices, which has no timeout and cannot be cancelled (see marin-community/marin#8538),
    and no public function tells the others why a process ends.
    """
    module = sys.modules.get("jax._src.distributed")
    return module.global_state.client if module else None


def _connect(cluster: Cluster) -> bool:
    """Joins the other processes; returns False if there are none."""
    import jax

    # jax's own service catches SIGTERM from here on, also before the first step and after the last,
    # where a run must end at once. olmoe_jax.parallel.preemption catches SIGTERM between them.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method="deactivate" if cluster.coordinator_address else None,
            initialization_timeout=_JOIN_TIMEOUT,
            heartbeat_timeout_seconds=cluster.heartbeat_timeout,
        )
    except ValueError:
        if cluster.num_processes is None:
            return False  # A machine that has a TPU's device files, but no TPU for jax.
        raise
    except RuntimeError as error:
        raise UserError(
            f"process {cluster.process_id} of {cluster.num_processes} cannot join at "
            f"{cluster.coordinator_address or 'the address that jax found'} "
            f"({_reason(error)}); all processes must start within {_JOIN_TIMEOUT} s, each with its "
            "own process_id, and reach that host and port"
        ) from error
    return jax.process_count() > 1


def _check_devices() -> None:
    import jax

    own, processes = jax.local_device_count(), jax.process_count()
    if own * processes != jax.device_count():
        raise UserError(
            f"process {jax.process_index()} has {own} devices, which is not a share of the "
            f"{jax.device_count()} of all {processes} processes; give each equally many"
        )


def _watch(ended: threading.Event) -> None:
    """Exits with the code of a process that failed; returns when `ended` is set."""
    while not ended.wait(_BEAT):
        if (code := _failure()) is not None:
            _exit(code)


def _failure() -> int | None:
    """Returns the exit code of the process that failed first; None while all are well."""
    with contextlib.suppress(RuntimeError):  # no such key yet, or the service is gone
        return int(_client().key_value_try_get(_FAILURE))
    return None


def _fail(error: BaseException) -> NoReturn:
    """Ends all processes because of this process's error."""
    if isinstance(error, SystemExit):
        _end_all(error.code if isinstance(error.code, int) else 1, "")
    if is_lost_contact(error) and not isinstance(error, UserError):
        # Most often another process failed first and is about to say why: let the watching thread
        # find its code.
        time.sleep(5 * _BEAT)
        _end_all(
            1,
            f"error: a process does not answer ({_reason(error)}); look at its output; "
            "the same command continues from the last checkpoint",
        )
    _end_all(*outcome(error))


def _end_all(code: int, message: str) -> NoReturn:
    """Prints the message and exits, and so do the others; the first of them that fails counts."""
    with _ending:
        try:
            _client().key_value_set(_FAILURE, str(code))
        except RuntimeError:
            if (first := _failure()) is not None:
                _exit(first)
        if message:
            print(message, file=sys.stderr, flush=True)
        _exit(code)


def _exit(code: int) -> NoReturn:
    """Ends this process without Python's exit, which would wait for processes that are gone."""
    import jax

    with _ending:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            _client().wait_at_barrier("olmoe_jax/leave", _LEAVE_TIMEOUT * 1000)
            # Process 0 goes last: jax aborts a process whose service is gone.
            time.sleep(_BEAT if jax.process_index() == 0 else 0)
        os._exit(code)
