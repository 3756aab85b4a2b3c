"""The commands that fill the table, train -> export -> evaluate for each cell, and their runner."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from configs.table import DATASETS, experiment
from eval.evaluation import RESULT
from eval.tasks.task import local_path
from olmoe_jax.config import Config, apply_overrides
from olmoe_jax.errors import UserError
from olmoe_jax.root import ROOT

_OTHER_TASKS = {"codealpaca": ("mbpp", "humaneval")}
_OTHER_FILES = {
    "gsm": ("gsm/train.jsonl", "gsm8k/test.jsonl"),
    "codealpaca": ("codealpaca/train.jsonl",),
}


def tasks_of(dataset: str) -> tuple[str, ...]:
    """Returns the tasks on which models of a data set are evaluated."""
    return _OTHER_TASKS.get(dataset, (dataset,))


def own_files(dataset: str) -> tuple[str, ...]:
    """Returns the paths below --data: rows to train on and, if there are any, of the eval loss."""
    names = (f"esft/train/{dataset}.jsonl", f"esft/eval/{dataset}.jsonl")
    return _OTHER_FILES.get(dataset, names)


def local_files(data: Path, dataset: str) -> list[Path]:
    """Returns the files of `own_files` in `data`, where they may have the hub's paths."""
    hub = DATASETS[dataset]
    files = ("train.jsonl", hub.eval_file)
    return [
        local_path(data, name, f"{hub.hub_id}:{file}")
        for name, file in zip(own_files(dataset), files, strict=False)
    ]


def check_data(data: Path, datasets: Sequence[str]) -> None:
    """Raises `UserError` for a local data file that is missing."""
    for dataset in datasets:
        for file in local_files(data, dataset):
            if not file.exists():
                raise UserError(
                    f"--data {data}: no {file.relative_to(data)} there for {dataset}; put the file "
                    "there, or name the other data sets with --datasets"
                )


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of python."""

    name: str  # for the user
    arguments: list[str]  # after `python`
    done: Callable[[], bool]  # returns whether the result is there
    weights: tuple[Path, ...] = ()  # directories that no command after this one needs


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A part of the table: methods and data sets by their names in configs/table.py."""

    output: Path
    methods: Sequence[str]
    datasets: Sequence[str]
    model: str  # hub id or directory from which all start
    data: Path | None  # a directory of local data files; None: the hub
    config: Mapping[str, str]  # {dotted field: text} for every training run
    evaluation: Sequence[str]  # flags for every eval.run
    # Returns further fields for a method, which `config` overrides.
    by_method: Callable[[str], Mapping[str, str]] = lambda method: {}

    def check_fields(self) -> None:
        """Raises `UserError` for a field that cannot be set."""
        for dataset in self.datasets:
            for method in self.methods:
                self.resolved(method, dataset)

    def resolved(self, method: str, dataset: str) -> Config:
        """Returns a cell's configuration."""
        return apply_overrides(experiment(method, dataset), self.overrides(method, dataset))

    def overrides(self, method: str, dataset: str) -> dict[str, str]:
        """Returns the fields of a cell that differ from its file in configs/."""
        fields = {
            "model.path": self.model,
            "train.output_dir": str(self.directory(method, dataset)),
            "train.export_hf": "false",
            "train.keep_checkpoints": "1",
        }
        if self.data:
            train, *evaluation = map(str, local_files(self.data, dataset))
            fields["data.train_path"] = train
            fields["data.eval_path"] = evaluation[0] if evaluation else "none"
        return fields | self.by_method(method) | dict(self.config)

    def directory(self, method: str, dataset: str) -> Path:
        """Returns the directory of a cell's training run."""
        return self.output / f"{method}_{dataset}"

    def commands(self) -> Iterator[Command]:
        """Yields the commands in their order: the base's evaluation, then cell after cell."""
        tasks = [task for dataset in self.datasets for task in tasks_of(dataset)]
        yield self._evaluate("base", self.model, self.output / "base" / "eval", tasks)
        for dataset in self.datasets:
            for method in self.methods:
                yield from self._cell(method, dataset)

    def report(self) -> Command:
        """Returns the command that writes the report."""
        runs = [str(self.directory(m, d)) for d in self.datasets for m in self.methods]
        arguments = ["-m", "eval.report", f"base={self.output}/base/eval", *runs]
        return Command(
            "report", [*arguments, "--output", str(self.output / "report")], lambda: True
        )

    def _cell(self, method: str, dataset: str) -> Iterator[Command]:
        run, name = self.directory(method, dataset), f"{method} {dataset}"
        evaluate = self._evaluate(name, str(run / "hf"), run / "eval", tasks_of(dataset))
        train = ["-m", "olmoe_jax.training", "--config", str(ROOT / f"configs/{run.name}.py")]
        fields = self.overrides(method, dataset).items()
        train += [f"--config.{field}={value}" for field, value in fields]
        export = ["-m", "convert.to_hf", "--checkpoint", str(run), "--output", str(run / "hf")]
        # An evaluated cell needs no weights: they may be gone (--discard_weights). The loss curve
        # is drawn when a run ends; a run that SIGTERM stopped has none.
        trained, exported = run / "loss.png", run / "hf"
        yield Command(f"train {name}", train, lambda: evaluate.done() or trained.exists())
        yield Command(f"export {name}", export, lambda: evaluate.done() or exported.exists())
        yield dataclasses.replace(evaluate, weights=(run / "checkpoints", exported))

    def _evaluate(self, name: str, model: str, output: Path, tasks: Sequence[str]) -> Command:
        arguments = ["-m", "eval.run", "--model", model, "--tasks", ",".join(tasks)]
        arguments += ["--output", str(output)]
        arguments += ["--data", str(self.data)] if self.data else []
        files = [output / task / RESULT for task in tasks]
        return Command(
            f"evaluate {name}",
            [*arguments, *self.evaluation],
            lambda: all(file.exists() for file in files),
        )


class Runner:
    """Runs commands one after the other. SIGTERM stops the running one, and none starts after it.

    What one command compiled is kept in the directory `output` for the next.
    """

    def __init__(self, output: Path):
        self._process: subprocess.Popen | None = None
        self._stopped = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            "JAX_COMPILATION_CACHE_DIR": str((output / "compiled").absolute()),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        signal.signal(signal.SIGTERM, self._stop)

    def run(self, command: Command) -> None:
        """Runs a command to its end.

        Raises:
          UserError: the command failed, or was stopped before its end.
        """
        print(" ".join(["python", *command.arguments]), flush=True)
        if not self._stopped:
            arguments = [sys.executable, *command.arguments]
            self._process = subprocess.Popen(arguments, env=self._environment)
            code = self._process.wait()
        if self._stopped:
            raise UserError(f"SIGTERM while at: {command.name}; the same command continues there")
        if code or not command.done():
            how = f"failed with exit code {code}" if code else "stopped before its end"
            raise UserError(
                f"{command.name} {how}; see what it says above; the same command continues there"
            )

    def _stop(self, *_: object) -> None:
        self._stopped = True
        if self._process:
            self._process.terminate()
