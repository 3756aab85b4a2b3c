"""TensorBoard's event files, written by the thread that reports.

`tensorboard.summary.Writer` writes in a thread of its own, which prints a traceback when the disk
is full, and lacks the events below.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import (
    HParam,
    Metric,
    hparams_config_pb,
    hparams_pb,
)
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from olmoe_jax.errors import printable

_PREFIX = "events.out.tfevents."
_FIRST = {
    "train/loss": "loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "gradient_norm",
    "speed/tokens_per_second": "tokens_per_second",
    "eval/loss": "eval_loss",
    "eval/exact_match": "exact_match",
}
"""The scalars that a reader looks for first. TensorBoard sorts its charts by their tags."""
TAGS = {tag: f"1_run/{place}_{name}" for place, (tag, name) in enumerate(_FIRST.items(), 1)}
"""{name of a scalar elsewhere: its tag in TensorBoard}, if the two differ."""
_SHOWN = (
    "data.train_path",
    "method.lora_rank",
    "method.name",
    "optimizer.learning_rate",
    "train.seed",
)
"""The columns of the HPARAMS page that are shown at first."""
_METRICS = ("train/loss", "eval/loss", "eval/exact_match")
"""The metrics of the HPARAMS page."""


class EventFile:
    """A new event file in a directory, which TensorBoard reads after those that are there.

    Raises:
      OSError: from every method, if the file cannot be written.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, which hold the second of their
        # making. The wall clock may have jumped back since the last file.
        seconds = [_second(file) + 1 for file in directory.glob(f"{_PREFIX}*")]
        second = max([int(time.time()), *seconds])
        name = f"{_PREFIX}{second:010}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a value, under its name in `TAGS`."""
        self._add(step, tag=TAGS.get(tag, tag), simple_value=value)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Adds Markdown text."""
        self._add(
            step,
            tag=tag,
            tensor=tensor_util.make_tensor_proto([printable(text)]),
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
        shown = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        metrics = [Metric(TAGS[name], display_name=_FIRST[name]) for name in _METRICS]
        columns = hparams_config_pb([HParam(name) for name in shown], metrics)
        metadata = columns.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(metadata.content)
        for column in content.experiment.hparam_infos:
            # TensorBoard shows five columns, and sorts those first that it believes to differ.
            column.differs = column.name in _SHOWN
        metadata.content = content.SerializeToString()
        self._write(step=0, summary=columns)
        self._write(step=0, summary=hparams_pb(shown, trial_id=printable(run)))

    def restart(self, step: int) -> None:
        """Tells TensorBoard to forget what an interrupted run wrote for `step` and later."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step, session_log=start)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Hands everything to the operating system and closes the file."""
        self._file.close()

    def _add(self, step: int, **value: Any) -> None:
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(**value)])
        self._write(step=step, summary=summary)

    def _write(self, **event: Any) -> None:
        made = event_pb2.Event(wall_time=time.time(), **event)
        self._records.write(made.SerializeToString())


def _second(file: Path) -> int:
    """Returns the second in a file's name, 0 if another program named the file."""
    found = re.match(r"\d{1,10}(?=\.)", file.name.removeprefix(_PREFIX), re.ASCII)
    return int(found[0]) if found else 0
