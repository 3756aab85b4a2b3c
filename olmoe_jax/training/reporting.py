"""What a run tells: metrics.jsonl, TensorBoard, the terminal, and the loss curve at the end."""

import functools
import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary import DirectoryOutput, Writer
from tensorboard.util import tensor_util
from tqdm import tqdm

from olmoe_jax.training.run_directory import METRICS, read_metrics

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal: how often progress is printed."""


class EventFiles(DirectoryOutput):
    """TensorBoard event files, with the events that `tensorboard.summary.Writer` lacks."""

    def emit_scalar(self, *, tag: str, data, step, wall_time: float, **_) -> None:
        """Overrides the way in which `Writer.add_scalar` stores a value.

        As a plain value: of tensors, TensorBoard's EventAccumulator keeps the repeated steps.
        """
        event = event_pb2.Event(wall_time=wall_time, step=step)
        event.summary.value.add(tag=tag, simple_value=data)
        self._ev_writer.add_event(event)

    def text(self, tag: str, text: str) -> None:
        """Adds Markdown text at step 0."""
        event = event_pb2.Event(wall_time=time.time(), step=0)
        event.summary.value.add(
            tag=tag,
            tensor=tensor_util.make_tensor_proto([text]),
            metadata=summary_pb2.SummaryMetadata(
                plugin_data=text_metadata.create_summary_metadata("", None).plugin_data,
                data_class=summary_pb2.DATA_CLASS_TENSOR,
            ),
        )
        self._ev_writer.add_event(event)

    def restart(self, step: int) -> None:
        """Tells TensorBoard to forget what an interrupted run wrote for `step` and later."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._ev_writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=step, session_log=start)
        )


class Reporter:
    """Everything that a run reports while it runs.

    Args:
      output: the run's directory.
      first_step: updates already done.
      total_steps: of the whole run.
      config_json: the resolved configuration, shown as text in TensorBoard.
    """

    def __init__(self, output: Path, first_step: int, total_steps: int, config_json: str):
        _silence_writer_threads()
        self.output = output
        self._metrics = (output / METRICS).open("a")
        events = EventFiles(str(output / "tensorboard"))
        self._board = Writer(events)
        events.restart(first_step + 1)
        events.text("config", f"```json\n{config_json}\n```")
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._started, self._first_step = time.monotonic(), first_step
        self._last_line = -math.inf

    def say(self, message: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._is_terminal:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def step(self, line: dict[str, Any], scalars: dict[str, float]) -> None:
        """Reports a step: `line` goes to metrics.jsonl, both to TensorBoard."""
        self._write(line)
        step = line["step"]
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step)
        speed = scalars["speed/tokens_per_second"]
        loss = scalars["train/loss"]
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        self._maybe_print(step, loss, line["learning_rate"], speed)

    def evaluation(self, step: int, loss: float) -> None:
        """Reports the mean loss per token on the evaluation data."""
        perplexity = math.exp(min(loss, 700.0))
        self._write({"step": step, "eval_loss": loss})
        self._board.add_scalar("eval/loss", loss, step)
        self._board.add_scalar("eval/perplexity", perplexity, step)
        self.say(f"step {step}: eval loss {loss:.4f}, perplexity {perplexity:.3f}")

    def flush(self) -> None:
        """Everything reported so far is on disk when this returns."""
        self._metrics.flush()
        self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self._board.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _maybe_print(self, step: int, loss: float, learning_rate: float, speed: float) -> None:
        now, total = time.monotonic(), self._bar.total
        if self._is_terminal or (now - self._last_line < SECONDS_BETWEEN_LINES and step < total):
            return
        self._last_line = now
        pace = (now - self._started) / (step - self._first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (total - step)))
        print(
            f"step {step}/{total}: loss {loss:.4f}, lr {learning_rate:.3g}, "
            f"{speed:,.0f} tokens/s, {left} left",
            flush=True,
        )


class Silence:
    """In place of the Reporter on the processes that do not write."""

    def _nothing(self, *_) -> None:
        pass

    say = step = evaluation = flush = close = _nothing


@functools.cache
def _silence_writer_threads() -> None:
    """TensorBoard's thread raises its error again in ours; its own trace would come besides."""
    show = threading.excepthook

    def show_others(args):
        if not type(args.thread).__module__.startswith("tensorboard."):
            show(args)

    threading.excepthook = show_others


def router_scalars(load, entropy, tokens: int) -> dict[str, float]:
    """TensorBoard scalars of the router, per layer.

    Args:
      load: [L, E], a step's tokens that selected each expert.
      entropy: [L], sums over the step's tokens of the entropy of the router's probabilities, nats.
      tokens: the number of real tokens in the step.
    """
    load, entropy = np.asarray(load), np.asarray(entropy) / max(1, tokens)
    share = load / np.maximum(1.0, load.sum(axis=1, keepdims=True))
    scalars = {
        "router/entropy_mean": float(entropy.mean()),
        "router/unused_experts": float((load == 0).sum()),
    }
    for layer in range(load.shape[0]):
        # 1 is a perfectly even load.
        scalars[f"router_load_max/layer_{layer:02}"] = float(share[layer].max() * load.shape[1])
        scalars[f"router_load_min/layer_{layer:02}"] = float(share[layer].min() * load.shape[1])
        scalars[f"router_entropy/layer_{layer:02}"] = float(entropy[layer])
    return scalars


def plot_losses(output: Path) -> None:
    """Draws training and evaluation loss over steps into OUTPUT_DIR/loss.png."""
    from matplotlib.figure import Figure

    lines = read_metrics(output)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, color="tab:blue", label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="tab:orange", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=output.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120)
