"""TensorBoard's event files, with the events that `tensorboard.summary.Writer` lacks."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary import DirectoryOutput
from tensorboard.util import tensor_util

_PREFIX = "events.out.tfevents."


class EventFiles(DirectoryOutput):
    """A directory of event files, for `tensorboard.summary.Writer` and beside it."""

    def __init__(self, path: Path):
        earlier = set(path.glob(f"{_PREFIX}*"))
        super().__init__(str(path))
        (own,) = set(path.glob(f"{_PREFIX}*")) - earlier
        _put_before(own, earlier)

    def emit_scalar(self, *, tag: str, data: float, step: int, wall_time: float, **_: Any) -> None:
        """Stores a value of `Writer.add_scalar` as a plain value.

        The library stores a tensor, of which TensorBoard's EventAccumulator keeps repeated steps.
        """
        self._add(step, wall_time, tag=tag, simple_value=data)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Adds Markdown text."""
        self._add(
            step,
            tag=tag,
            tensor=tensor_util.make_tensor_proto([text]),
            metadata=summary_pb2.SummaryMetadata(
                plugin_data=text_metadata.create_summary_metadata("", None).plugin_data,
                data_class=summary_pb2.DATA_CLASS_TENSOR,
            ),
        )

    def image(self, tag: str, png: bytes, step: int) -> None:
        """Adds a PNG."""
        self._add(step, tag=tag, image=summary_pb2.Summary.Image(encoded_image_string=png))

    def hyperparameters(self, values: Mapping[str, bool | float | str], run: str) -> None:
        """Adds the row of TensorBoard's HPARAMS page; one run's sessions share it."""
        event = event_pb2.Event(wall_time=time.time(), step=0)
        event.summary.MergeFrom(hparams_pb(dict(values), trial_id=run))
        self._ev_writer.add_event(event)

    def restart(self, step: int) -> None:
        """Tells TensorBoard to forget what an interrupted run wrote for `step` and later."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._ev_writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=step, session_log=start)
        )

    def _add(self, step: int, wall_time: float | None = None, **value: Any) -> None:
        event = event_pb2.Event(wall_time=wall_time or time.time(), step=step)
        event.summary.value.add(**value)
        self._ev_writer.add_event(event)


def _put_before(last: Path, files: Iterable[Path]) -> None:
    """Renames the `files` whose names say that they were made after `last`.

    TensorBoard reads the files in the order of their names, which hold the second of their making.
    A continued run's file must come last, also when the wall clock has jumped back.
    """
    later = sorted((file for file in files if _second(file) >= _second(last)), reverse=True)
    for back, file in enumerate(later, start=1):
        rest = file.name.removeprefix(_PREFIX).partition(".")[2]
        file.rename(file.with_name(f"{_PREFIX}{_second(last) - back:010}.{rest}"))


def _second(file: Path) -> int:
    return int(file.name.removeprefix(_PREFIX).partition(".")[0])
