"""Checkpoints of a run: what trains, the optimizer, the step, the data position. Orbax, atomic."""

import contextlib
import dataclasses
import functools
import logging
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from olmoe_jax.checkpoints.opening import CHECKPOINTS
from olmoe_jax.errors import UserError
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel import distributed
from olmoe_jax.training.best import score_of
from olmoe_jax.training.step import TrainState

CHUNK_BYTES = 64 * 2**20
"""Stored chunk: bounds what must be read to get a slice of a stacked weight."""

NO_LIMIT = 100 * 365 * 86400
"""Seconds that a save may take. Orbax's 20 minutes are the wall clock's, which may jump; that
another process is gone, its heartbeat tells."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint brought back: the state, and where the data stood."""

    step: int
    state: TrainState
    data: dict[str, Any]  # the Grain iterator's state
    best_score: float | None  # of training.best


class _DamagedError(Exception):
    """A checkpoint that is there cannot be read; the message is the reason."""


class _Manager(ocp.CheckpointManager):
    def _get_metrics(self, step: int):
        """Overrides the reading of metrics, which are of no use when they are damaged."""
        try:
            return super()._get_metrics(step)
        except ValueError:
            return None


class Checkpointer:
    """Saves in the background, keeps the latest few and the best.

    Args:
      output: the run's directory.
      keep: latest checkpoints to keep.
      identity: what a checkpoint must agree on to be continued (JSON: architecture, data).
    """

    def __init__(self, output: Path, keep: int, identity: dict[str, Any]):
        _silence_failed_saves()
        _steady_clock()
        self._identity = identity
        self._output = output
        best = preservation.BestN(
            get_metric_fn=score_of,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = _Manager(
            (output / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([preservation.LatestN(keep), best]),
                # The policy alone would forget the best when the run is continued: without this,
                # a checkpoint's metrics are not written.
                best_fn=score_of,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=NO_LIMIT),
            ),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        kept_with_it: Parameters,
        data: dict[str, Any],
        best: dict[str, float] | None,
    ) -> None:
        """Starts saving; the arrays are copied before it returns.

        Args:
          kept_with_it: frozen parameters that could not be found again elsewhere.
          best: of `Best.improvement`; None: this one is not the best so far.
        """
        tree = {**state._asdict(), "frozen": kept_with_it}
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        with self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree, save_args=save_args),
                    data=ocp.args.JsonSave(data),
                    identity=ocp.args.JsonSave(self._identity),
                ),
                metrics=best,
                force=True,
            )

    def check(self) -> None:
        """Raises if a save in the background has failed."""
        with self._saving():
            self._manager.check_for_errors()

    def is_saving(self) -> bool:
        """Whether a save in the background is under way."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        self.wait()
        self._manager.close()

    def restore(self, like: TrainState) -> Restored | None:
        """Reads the newest checkpoint onto the shardings of `like`; None: there is none.

        If there is one, the arrays of `like` are deleted first: the state is never there twice.

        One that cannot be read is set aside, and the one before it read. With several processes,
        of which others may have read theirs, the run ends instead, to be started again.

        Raises:
          UserError: it is of another model or other data, or no checkpoint can be read.
        """
        if self._manager.latest_step() is not None:
            like = jax.tree.map(_deleted, like)
        while (step := self._manager.latest_step()) is not None:
            try:
                return self._restore(step, like)
            except _DamagedError as damage:
                self._set_aside(step, str(damage))
        return None

    def _restore(self, step: int, like: TrainState) -> Restored:
        self._check_identity(step)
        tree = like._asdict()
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        restored = self._read(
            step,
            state=ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True),
            data=ocp.args.JsonRestore(),
        )
        best = max(map(score_of, self._best_metrics()), default=None)
        return Restored(step, TrainState(**restored.state), restored.data, best)

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
                raise
            raise _DamagedError(reason) from error

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a damaged checkpoint away, where there is an earlier one to continue from."""
        unreadable = f"{self._output}: the checkpoint of step {step} cannot be read ({reason})"
        earlier = [other for other in self._manager.all_steps() if other < step]
        if not earlier:
            raise UserError(
                f"{unreadable}, and there is none before it; bring it back, or remove "
                f"{CHECKPOINTS}/{step} to start from the beginning"
            )
        aside = self._output / f"damaged-{step}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        with contextlib.suppress(FileNotFoundError):  # another process did it
            (self._output / CHECKPOINTS / str(step)).rename(aside)
        if jax.process_count() > 1:
            raise UserError(
                f"{unreadable}; it is now {aside}; run the same command again to continue from "
                f"step {earlier[-1]}"
            )
        print(f"{unreadable}; it is now {aside}; going back to step {earlier[-1]}", flush=True)
        self._manager.reload()

    def _check_identity(self, step: int) -> None:
        saved = self._read(step, identity=ocp.args.JsonRestore()).identity
        for key, value in self._identity.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{self._output}: the checkpoint of step {step} "
                    f"{_other(key, saved.get(key), value)}; "
                    "bring it back, write another train.output_dir, or train.resume=restart"
                )

    def _best_metrics(self) -> list[dict[str, float]]:
        return list(filter(None, map(self._manager.metrics, self._manager.all_steps())))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Says what a save that fails means; that another process is gone is said elsewhere."""
        try:
            yield
        except Exception as error:
            if distributed.is_lost_contact(error):
                raise
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        reason = "no space left on the disk" if "No space left" in reason else reason[:300]
        complete = self._manager.all_steps(read=True)
        kept = f"the checkpoint of step {complete[-1]} is intact" if complete else "there is none"
        return UserError(
            f"{self._output}: a checkpoint could not be saved ({reason}); {kept}; free space and "
            "run the same command again"
        )


def _other(key: str, saved: Any, value: Any) -> str:
    """How a checkpoint's identity differs, in words."""
    if key != "model":
        return f"is of other {key} (another file content, tokenizer, data.max_seq_length or split)"
    field = next(name for name in saved | value if saved.get(name) != value.get(name))
    return (
        f"is of a different model: it has {field}={saved.get(field)}, config.json now says "
        f"{field}={value.get(field)}"
    )


def _steady_clock() -> None:
    """The threads of a save wait 5 minutes for each other: by a clock that does not jump."""
    with contextlib.suppress(ImportError):  # no public module; the clock is all that would be lost
        from orbax.checkpoint._src.futures import signaling_client

        signaling_client.time = types.SimpleNamespace(time=time.monotonic)


@functools.cache
def _silence_failed_saves() -> None:
    """A failed save raises, see `_failed`; the threads below it would print hundreds of lines."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(unraisable):
        # From writes of tensorstore that were still under way.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def _deleted(array: jax.Array) -> jax.ShapeDtypeStruct:
    """What it was; its memory is free."""
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    array.delete()
    return shape
