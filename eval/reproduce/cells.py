"""The commands that fill the table: train -> export -> evaluate for each cell."""

import dataclasses
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
    """A command of python.

    Attributes:
      name: for the user.
      arguments: after `python`.
      done: returns whether the result is there.
      weights: directories that no command after this one needs.
    """

    name: str
    arguments: list[str]
    done: Callable[[], bool]
    weights: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A part of the table.

    Attributes:
      output: the directory.
      methods, datasets: the cells' names, as in configs/table.py.
      model: hub id or directory from which all start.
      data: a directory of local data files; None: the hub.
      config: {dotted field: text} for every training run.
      evaluation: flags for every eval.run.
      by_method: returns further fields for a method, which `config` overrides.
    """

    output: Path
    methods: Sequence[str]
    datasets: Sequence[str]
    model: str
    data: Path | None
    config: Mapping[str, str]
    evaluation: Sequence[str]
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
            "train.output_dir": str(self.run(method, dataset)),
            "train.export_hf": "false",
            "train.keep_checkpoints": "1",
        }
        if self.data:
            train, *evaluation = map(str, local_files(self.data, dataset))
            fields["data.train_path"] = train
            fields["data.eval_path"] = evaluation[0] if evaluation else "none"
        return fields | self.by_method(method) | dict(self.config)

    def run(self, method: str, dataset: str) -> Path:
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
        runs = [str(self.run(m, d)) for d in self.datasets for m in self.methods]
        arguments = ["-m", "eval.report", f"base={self.output}/base/eval", *runs]
        return Command(
            "report", [*arguments, "--output", str(self.output / "report")], lambda: True
        )

    def _cell(self, method: str, dataset: str) -> Iterator[Command]:
        run, name = self.run(method, dataset), f"{method} {dataset}"
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
