"""The run: steps, evaluations, checkpoints, reports, and at the end the export."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoe_jax import data
from olmoe_jax.checkpoints.metrics import read_metrics
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.config import Config, to_dict, validate
from olmoe_jax.errors import UserError
from olmoe_jax.methods import Method, Preparation
from olmoe_jax.model.flops import step_flops_per_token
from olmoe_jax.parallel import distributed, sharding
from olmoe_jax.parallel.preemption import Preemption
from olmoe_jax.plots import plot_losses
from olmoe_jax.training import run_directory
from olmoe_jax.training.base_model import BaseModel, open_model
from olmoe_jax.training.best import Best, best_step
from olmoe_jax.training.checkpoint import Checkpointer, Restored
from olmoe_jax.training.datasets import (
    Datasets,
    check_same_everywhere,
    load_datasets,
    row_layout,
    training_data,
    write_model_files,
)
from olmoe_jax.training.decoding import HeldOut, held_out_sample
from olmoe_jax.training.evaluation import Evaluation
from olmoe_jax.training.introduction import introduction
from olmoe_jax.training.program import Program, build_program
from olmoe_jax.training.proofs import with_proven_kernels
from olmoe_jax.training.reporting import (
    TENSORBOARD,
    Reporter,
    Silence,
    check_wandb,
    finite,
    step_scalars,
)
from olmoe_jax.training.step import StepMetrics
from olmoe_jax.training.telemetry import Breakdown, Profile


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    output_dir: Path
    step: int  # the last step's number, from 1
    finished: bool  # False: SIGTERM stopped the run, which the same command continues


def train(config: Config) -> TrainResult:
    """Fine-tunes a model; continues the run that the output directory holds, if it holds one.

    Raises:
      UserError: the configuration or an input is wrong (nothing was written), a write failed, or
        the loss stays non-finite.
    """
    config = validate(config)
    check_wandb(config.train.wandb_project)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    with distributed.writer_first("download, tokenise"):
        if distributed.is_writer():
            run_directory.check(config)
        model = open_model(config)
        datasets = load_datasets(config, model)
    steps = training_data(config, datasets, mesh)
    held_out = held_out_sample(config, model, datasets)
    check_same_everywhere(config, datasets)
    config, model = with_proven_kernels(config, model, steps.row_length)
    try:
        write_model = functools.partial(write_model_files, config, model, datasets)
        with run_directory.opened(config, write_model) as output:
            preparation = Preparation(
                output=output,
                source=model.source,
                settings=model.settings,
                mesh=mesh,
                dataset=steps.first_epoch,
                layout=row_layout(config, datasets, mesh),
                seed=config.train.seed,
            )
            model = dataclasses.replace(model, method=model.method.prepare(preparation))
            with jax.set_mesh(mesh):
                program = build_program(config, model, mesh, steps.total_steps)
                run = _Run(config, model, datasets, held_out, steps, program, output)
                result = run.execute()
            if result.finished and distributed.is_writer():
                _finish(config, model.method, output, result.step)
    except OSError as error:
        raise run_directory.write_error(Path(config.train.output_dir), error) from error
    return result


def _finish(config: Config, method: Method, output: Path, step: int) -> None:
    """Draws the loss curve and writes the exports of a finished run, from its checkpoints."""
    plot_losses(read_metrics(output), output.absolute().name, output / run_directory.LOSS_PLOT)
    options = config.train
    wanted = {"": step} if options.export_hf else {}
    if options.export_best:
        wanted["_best"] = best_step(output)
    for suffix, wanted_step in wanted.items():
        target = output / f"{method.export_name}{suffix}"
        # A directory under its final name is complete: see checkpoints.directory.new_directory.
        if target.exists():
            print(f"{target} is there already; remove it to export again")
            continue
        method.export(RunCheckpoint(output, wanted_step), target)
        print(f"exported step {wanted_step} to {target}")


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose numbers the devices may still compute."""

    step: data.Step
    metrics: StepMetrics
    stop: jax.Array | bool  # the answer to `Preemption.ask`


class _Run:
    """A run in progress.

    The host is one step ahead of its reports: while the devices compute a step, it reports the step
    before (`pending`). `done` counts the steps that were started, on the host; the devices count
    the same steps in `state.step`, and a checkpoint is named by this number.
    """

    def __init__(
        self,
        config: Config,
        model: BaseModel,
        datasets: Datasets,
        held_out: HeldOut | None,
        steps: data.TrainingData,
        program: Program,
        output: Path,
    ):
        self.config, self.model, self.datasets, self.program = config, model, datasets, program
        self.output, self.held_out = output, held_out
        self.steps, self.iterator = steps, steps.iterator()
        self.state, self.best = program.state, Best(config.train)
        identity = {**model.identity(), **datasets.identity()}
        self.checkpoints = Checkpointer(output, config.train.keep_checkpoints, identity)
        # Weights drawn at random are nowhere else: a checkpoint keeps the frozen ones too.
        self.kept_frozen = {} if model.source else program.frozen
        # Before a checkpoint is restored: the evaluation remembers the base's routing.
        self.evaluation = None
        if datasets.evaluation is not None:
            self.evaluation = Evaluation(config, datasets.evaluation, datasets, program)
        restored = self._restore()
        self.done = self.saved = restored.step if restored else 0
        self.reporter = self._reporter(output, restored.report if restored else None)
        self.preemption = Preemption(program.mesh)
        self.pending: _Pending | None = None
        self.clock = Breakdown()
        profile_steps = config.train.profile_steps if distributed.is_writer() else 0
        self.profile = Profile(output / TENSORBOARD, profile_steps)
        self.expert_load = np.zeros((model.config.num_layers, model.config.num_experts))
        self.last_report = time.monotonic()
        self.flops_per_token = self._flops_per_token()

    def execute(self) -> TrainResult:
        """Runs the remaining steps."""
        for line in introduction(self.config, self.model, self.datasets, self.steps, self.program):
            self.reporter.say(line)
        if self.done:
            self.reporter.say(f"continuing after step {self.done} of {self.steps.total_steps}")
            moved = run_directory.update_config(self.config) if distributed.is_writer() else ()
            for line in moved:
                self.reporter.say(line)
        try:
            with self.preemption:
                while self.done < self.steps.total_steps and not self.preemption.stop:
                    self._one_step()
                self._report_pending()
                if self.saved < self.done:
                    self._save(None)
        except BaseException:
            # Several processes end a save at a barrier, which a failed process never reaches.
            if jax.process_count() == 1:
                self._close()
            raise
        self._close()
        finished = self.done == self.steps.total_steps
        if not finished and distributed.is_writer():
            print(f"SIGTERM: saved step {self.done}; the same command continues the run")
        return TrainResult(self.output, self.done, finished)

    def _close(self) -> None:
        """Ends the profile, waits for the last save, and closes the reports."""
        self.reporter.say(self.profile.close())
        self.checkpoints.close()
        self.reporter.close()

    def _flops_per_token(self) -> float:
        """Returns what the mathematics of a step needs for an average token of the data."""
        lengths = self.steps.first_epoch.lengths
        # A token attends to half of its example on average; long examples hold more tokens.
        context = float((lengths**2).sum() / lengths.sum()) / 2
        trains = self.state.parameters.__contains__
        return step_flops_per_token(self.model.config, self.model.settings, trains, context).model

    def _reporter(self, output: Path, report: dict[str, Any] | None) -> Reporter | Silence:
        if not distributed.is_writer():
            return Silence()
        run_directory.rewind_metrics(output, report)
        return Reporter(output, self.done, self.steps.total_steps, to_dict(self.config))

    def _restore(self) -> Restored | None:
        """Continues from the newest checkpoint, if there is one."""
        restored = self.checkpoints.restore(self.state)
        if restored is None:
            return None
        self.state = restored.state
        self.program.hold(self.state.parameters)
        self.iterator.set_state(restored.data)
        if restored.best_score is not None:
            self.best.score = restored.best_score
        return restored

    def _one_step(self) -> None:
        """Starts a step, and reports the step before while the devices work."""
        program = self.program
        self.reporter.say(self.profile.next_step(self.state))
        with self.clock.part("data"):
            step = next(self.iterator)
        batches = map(program.to_devices, step.batches)
        self.state, metrics = program.step(self.state, batches, step.index)
        self.done += 1
        # The devices work on this step while the host reports the one before.
        self._report_pending()
        self.pending = _Pending(step, metrics, self.preemption.ask())
        self.checkpoints.check()
        self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        """Evaluates, decodes and saves, as far as it is time for each."""
        options, done = self.config.train, self.done
        last = done == self.steps.total_steps
        epoch_ends = last or done % self.steps.steps_per_epoch == 0
        evaluate = epoch_ends or _due(options.eval_every, done)
        found: dict[str, float] = {}
        if evaluate:
            self._report_pending()
            self.reporter.expert_load(done, self.expert_load)
            self.expert_load[:] = 0
        if self.evaluation and evaluate:
            with self.clock.part("evaluation"):
                found["eval_loss"] = self._evaluate(self.evaluation)
        if self.held_out and (last or _due(self.config.generate.every, done)):
            self._report_pending()
            with self.clock.part("decoding"):
                found["exact_match"] = self._decode(self.held_out)
        best = self.best.improvement(found)
        if last or best or done % options.checkpoint_every == 0:
            self._report_pending()
            self._save(best)

    def _evaluate(self, evaluation: Evaluation) -> float:
        """Evaluates and reports; returns the mean loss per trained target."""
        found = evaluation.run(self.state.parameters)
        self.reporter.evaluation(self.done, found)
        self.last_report = time.monotonic()
        return found.loss

    def _decode(self, held_out: HeldOut) -> float:
        """Decodes the held-out prompts and reports; returns the share of right answers."""
        answers = held_out.answers(self.program, self.state.parameters)
        right = sum(answer.right for answer in answers) / len(answers)
        self.reporter.answers(self.done, right, answers)
        self.last_report = time.monotonic()
        return right

    def _save(self, best: dict[str, float] | None) -> None:
        """Saves a checkpoint; a continued run begins behind it.

        Everything that was reported goes to the disk first, since a continued run skips it.
        """
        report = self.reporter.flush()
        with self.clock.part("checkpoint"):
            self.checkpoints.save(
                self.done,
                self.state,
                self.kept_frozen,
                self.iterator.get_state(),
                report,
                best,
            )
        self.saved = self.done

    def _report_pending(self) -> None:
        """Waits for the pending step's numbers and reports them."""
        if self.pending is None:
            return
        with self.clock.part("devices"):
            step, metrics = self.pending.step, jax.device_get(self.pending.metrics)
        self.preemption.settle(self.pending.stop)
        self.pending = None
        now = time.monotonic()
        seconds, self.last_report = now - self.last_report, now
        line = {
            "step": step.index + 1,
            "loss": finite(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": finite(metrics.grad_norm),
            "tokens": step.tokens,
            "seconds": round(seconds, 4),
        }
        self.expert_load += metrics.statistics.load
        scalars = step_scalars(
            step, self.steps.steps_per_epoch, metrics, seconds, self.flops_per_token
        )
        self.reporter.step(line, scalars | self.clock.take())
        self._check_finite(step, metrics)

    def _check_finite(self, step: data.Step, metrics: StepMetrics) -> None:
        in_a_row, limit = int(metrics.skipped_in_a_row), self.config.train.max_nonfinite_steps
        if in_a_row:
            self.reporter.say(
                f"step {step.index + 1}: loss or gradient is not finite; update skipped "
                f"({int(metrics.skipped)} in this run)"
            )
        if in_a_row >= limit:
            raise UserError(
                f"the loss or the gradient was not finite in {in_a_row} updates in a row, up to "
                f"step {step.index + 1}; lower optimizer.learning_rate or look at the data; the "
                f"last checkpoint is of step {self.saved}"
            )


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0
