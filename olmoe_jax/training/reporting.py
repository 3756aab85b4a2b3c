"""The reports of a run: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import importlib.util
import io
import json
import math
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from tqdm import tqdm

from olmoe_jax.config import flatten
from olmoe_jax.data import Step
from olmoe_jax.errors import UserError, first_line
from olmoe_jax.plots import heat_maps
from olmoe_jax.training.decoding import Answer
from olmoe_jax.training.evaluation import Evaluated
from olmoe_jax.training.event_file import EventFile
from olmoe_jax.training.run_directory import METRICS, metrics_report
from olmoe_jax.training.step import StepMetrics
from olmoe_jax.training.telemetry import Pace, memory_scalars

TENSORBOARD = "tensorboard"
SECONDS_BETWEEN_LINES = 10.0
"""The pause between two lines of progress, if there is no terminal."""
SHOWN_ANSWERS = 4
"""How many decoded examples TensorBoard shows."""


class Reporter:
    """Everything that a run reports while it runs.

    `first_step` counts the updates already done, `total_steps` those of the whole run. `config` is
    the resolved configuration, {section: {field: value}}.
    """

    def __init__(
        self, output: Path, first_step: int, total_steps: int, config: dict[str, dict[str, Any]]
    ):
        self.output = output
        self._metrics = (output / METRICS).open("a")
        self._events = EventFile(output / TENSORBOARD)
        self._events.restart(first_step + 1)
        self._events.text("config", f"```json\n{json.dumps(config, indent=2)}\n```")
        fields = {path: "none" if v is None else v for path, v in flatten(config).items()}
        self._events.hyperparameters(fields, output.absolute().name)
        project = config["train"]["wandb_project"]
        self._wandb = WandB(project, output, config) if project else None
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not self._is_terminal,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._pace = Pace()
        self._last_line = -math.inf
        self._latest: dict[str, float | None] = {}

    def say(self, message: str | None) -> None:
        """Prints a line, if there is one, above the progress bar where there is that."""
        if message and self._is_terminal:
            self._bar.write(message)
        elif message:
            print(message, flush=True)

    def step(self, line: dict[str, Any], scalars: dict[str, float]) -> None:
        """Reports a step: `line` goes to metrics.jsonl, both to TensorBoard."""
        self._write(line)
        self._latest["loss"] = line["loss"]
        step = line["step"]
        self._scalars(scalars, step)
        speed = scalars["speed/tokens_per_second"]
        loss = scalars["train/loss"]
        self._pace.step_ends(time.monotonic())
        left = self._pace.left(self._bar.total - step)
        progress = f"{speed:,.0f} tokens/s" + (f", {left} left" if left else "")
        self._bar.set_postfix_str(f"loss {loss:.4f}, {progress}", refresh=False)
        self._bar.update(1)
        self._maybe_print(step, loss, line["learning_rate"], progress)

    def evaluation(self, step: int, found: Evaluated) -> None:
        """Reports the mean losses per token on the evaluation data, and the routing's change."""
        loss = found.loss
        perplexity = math.exp(min(loss, 700.0))
        self._latest["eval_loss"] = finite(loss)
        line: dict[str, Any] = {"step": step, "eval_loss": finite(loss)}
        if found.sets:
            line["eval_losses"] = {name: finite(value) for name, value in found.sets.items()}
        self._write(line)
        scalars = {
            "eval/loss": loss,
            "eval/perplexity": perplexity,
            "router/changed_choices": found.changed,
            **{f"eval_loss/{name}": value for name, value in found.sets.items()},
        }
        self._scalars(scalars, step)
        sets = "".join(f", {name} {value:.4f}" for name, value in found.sets.items())
        self.say(f"step {step}: eval loss {loss:.4f}{sets}, perplexity {perplexity:.3f}")

    def expert_load(self, step: int, load: np.ndarray) -> None:
        """Reports how many tokens went to each expert since the last report: load [L, E]."""
        share = load / np.maximum(1, load.sum(axis=1, keepdims=True)) * load.shape[1]
        png = io.BytesIO()
        heat_maps({"tokens of an expert / mean of its layer's": share}, png)
        self._events.image("router/expert_load", png.getvalue(), step)
        self._scalars({"router/dead_experts": float((load == 0).sum())}, step)

    def answers(self, step: int, right: float, answers: Sequence[Answer]) -> None:
        """Reports what the model wrote for held-out prompts, and the share that is right."""
        self._write({"step": step, "exact_match": right})
        self._scalars({"eval/exact_match": right}, step)
        self._events.text("eval/answers", answers_text(answers), step)
        self.say(f"step {step}: exact match {right:.1%} of {len(answers)} held-out examples")

    def flush(self) -> dict[str, Any]:
        """Puts everything reported so far on the disk.

        Returns:
          What a checkpoint keeps of it: `run_directory.metrics_report`, and "nonfinite", the names
          of the latest losses that are not finite.
        """
        self._metrics.flush()
        self._events.flush()
        bad = [name for name, value in self._latest.items() if value is None]
        return metrics_report(self.output) | {"nonfinite": bad}

    def close(self) -> None:
        """Ends every report."""
        self._bar.close()
        self._pace.close()
        self._metrics.close()
        self._events.close()
        if self._wandb:
            self._wandb.close()

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._events.scalar(tag, value, step)
        if self._wandb:
            self._wandb.scalars(scalars, step)

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _maybe_print(self, step: int, loss: float, learning_rate: float, progress: str) -> None:
        now, total = time.monotonic(), self._bar.total
        if self._is_terminal or (now - self._last_line < SECONDS_BETWEEN_LINES and step < total):
            return
        self._last_line = now
        print(
            f"step {step}/{total}: loss {loss:.4f}, lr {learning_rate:.3g}, {progress}", flush=True
        )


class Silence:
    """The reporter of a process that does not write."""

    def _nothing(self, *_: Any) -> None:
        pass

    say = step = evaluation = expert_load = answers = close = _nothing

    def flush(self) -> dict[str, Any]:
        """Returns nothing to keep: process 0 does."""
        return {}


def finite(value: float | np.ndarray) -> float | None:
    """Returns a float, or None for what JSON lacks: NaN and infinities."""
    return float(value) if np.isfinite(value) else None


def step_scalars(
    step: Step, steps_per_epoch: int, metrics: StepMetrics, seconds: float, flops_per_token: float
) -> dict[str, float]:
    """Returns TensorBoard's scalars of a step that took `seconds`; `metrics` are on the host.

    `flops_per_token` is what the mathematics of a step needs for a token.
    """
    speed, statistics = step.tokens / seconds, metrics.statistics
    scalars = {
        "train/loss": float(metrics.loss),
        "train/learning_rate": float(metrics.learning_rate),
        "train/grad_norm": float(metrics.grad_norm),
        "train/skipped_updates": float(metrics.skipped),
        "train/epoch": step.epoch + (step.index % steps_per_epoch + 1) / steps_per_epoch,
        "data/padding_share": step.padding / (step.padding + step.tokens),
        "data/tokens": step.tokens,
        "speed/seconds_per_step": seconds,
        "speed/tokens_per_second": speed,
        "speed/model_teraflops_per_second": flops_per_token * speed / 1e12,
        **router_scalars(statistics.load, statistics.entropy, step.tokens),
        **memory_scalars(),
    }
    if metrics.router_grad_norm is not None:
        scalars["router_gradient/norm"] = float(metrics.router_grad_norm)
    return scalars


def router_scalars(load: ArrayLike, entropy: ArrayLike, tokens: int) -> dict[str, float]:
    """Returns TensorBoard's scalars of the router, per layer.

    Args:
      load: [L, E], the step's tokens that chose each expert.
      entropy: [L], the entropy of the router's probabilities in nats, summed over the tokens.
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


def answers_text(answers: Sequence[Answer]) -> str:
    """Returns the first few answers as Markdown."""
    parts = []
    for answer in answers[:SHOWN_ANSWERS]:
        texts = {
            "prompt": answer.prompt,
            "expected": answer.expected,
            "right" if answer.right else "wrong": answer.output,
        }
        for label, text in texts.items():
            # Indented text is code: nothing that a model writes can end it or be markup.
            code = "\n".join(f"    {line}" for line in text.strip().split("\n"))
            parts.append(f"**{label}**\n\n{code}\n")
    return "\n".join(parts)


class WandB:
    """Weights & Biases: gets what TensorBoard gets, under the same names.

    Raises:
      UserError: the package is not installed, or does not begin a run: there is no key, say.
    """

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]):
        check_wandb(project)
        import wandb

        # All starts of a run are one run of W&B.
        id_file = output / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=output.absolute().name,
                id=id_file.read_text(),
                resume="allow",
                dir=str(output),
                config=dict(config),
            )
        except Exception as error:  # wandb raises many unrelated types
            raise UserError(
                f"train.wandb_project={project}: Weights & Biases does not begin the run "
                f"({first_line(error)}); set WANDB_API_KEY or WANDB_MODE=offline, or write none"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds scalars to a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises a `UserError` if a project is given and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb_project={project}: wandb is not installed; run pip install wandb, or "
            "write none"
        )
