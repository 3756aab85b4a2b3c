"""Reproduces the table of the paper: trains and evaluates every method on every data set.

For each cell: score the experts (ESFT) -> train -> export -> evaluate; then the report.

OUTPUT/reproduce.json        what was asked
OUTPUT/base/eval/            the results of the model that all start from
OUTPUT/scores/DATASET/       its experts' scores, and the experts that each ESFT method trains
OUTPUT/METHOD_DATASET/       the training run, in it hf/ (the export) and eval/ (the results)
OUTPUT/report/               report.md and report.html
OUTPUT/small/                with --small: the model and the data

Every step is a command of its own, which is printed. A step whose result is there is not done
again, and one that was interrupted continues: start the same command again.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from configs.table import DATASETS, ESFT, METHODS, experiment
from eval.evaluation import RESULT
from eval.run import parser as eval_parser
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import Config, ModelOptions, apply_overrides
from olmoe_jax.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).parents[1]
TASKS = {"codealpaca": ("mbpp", "humaneval")}
"""The tasks that a data set is evaluated on, where it is not the one of its name."""
LOCAL = {"gsm": ("gsm/train.jsonl", "gsm8k/test.jsonl"), "codealpaca": ("codealpaca/train.jsonl",)}
"""Under --data: the rows to train on and those of the eval loss; by default those of ESFT."""
ASKED = "reproduce.json"
_OWN = ("model", "tasks", "output", "data")
_OWN_FIELDS = ("model.path", "train.output_dir", "train.export_hf", "method.experts_path")
"""Flags of eval.run and fields of a run that are set here."""

EXAMPLE = """examples:
  python -m eval.reproduce --output runs/small --small
  python -m eval.reproduce --output runs/paper --eval.allow_code_execution --eval.batch_size=64
  python -m eval.reproduce --output runs/gsm --datasets gsm --methods conventional,densemixer \\
      --config.train.epochs=2 --eval.limit=200

--config.FIELD=VALUE goes to train.py, --eval.NAME[=VALUE] to eval.run as --NAME VALUE; a judge is
named by its variables (docs/evaluation.md). docs/reproduce.md says what it takes.
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of python, whether its result is there, and the weights it is the last to need."""

    name: str
    command: list[str]
    done: Callable[[], bool]
    weights: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to reproduce, and how.

    config: {dotted field: text} for every training run; evaluation: flags for eval.run;
    by_method: further fields, by method.
    """

    output: Path
    methods: Sequence[str]
    datasets: Sequence[str]
    model: str
    data: str | None
    config: Mapping[str, str]
    evaluation: Sequence[str]
    by_method: Callable[[str], Mapping[str, str]] = lambda method: {}

    def overrides(self, method: str, dataset: str) -> dict[str, str]:
        """The fields of a cell that are not those of its file in configs/."""
        fields = {
            "model.path": self.model,
            "train.output_dir": str(self.run(method, dataset)),
            "train.export_hf": "false",
            "train.keep_checkpoints": "1",
        }
        if self.data:
            train, *evaluation = map(str, _local_files(self.data, dataset))
            fields["data.train_path"] = train
            fields["data.eval_path"] = evaluation[0] if evaluation else "none"
        if method in ESFT:
            fields["method.experts_path"] = str(self.experts(method, dataset))
        return fields | self.by_method(method) | dict(self.config)

    def resolved(self, method: str, dataset: str) -> Config:
        """A cell's configuration.

        Raises:
          UserError: a field that was set cannot be.
        """
        return apply_overrides(experiment(method, dataset), self.overrides(method, dataset))

    def run(self, method: str, dataset: str) -> Path:
        return self.output / f"{method}_{dataset}"

    def experts(self, method: str, dataset: str) -> Path:
        return self.output / "scores" / dataset / f"{method}.json"

    def steps(self) -> Iterator[Step]:
        """All but the report, in their order."""
        tasks = [task for dataset in self.datasets for task in TASKS.get(dataset, (dataset,))]
        yield self._evaluate("base", self.model, self.output / "base" / "eval", tasks)
        for dataset in self.datasets:
            for method in self.methods:
                yield from self._cell(method, dataset)

    def _cell(self, method: str, dataset: str) -> Iterator[Step]:
        run, name = self.run(method, dataset), f"{method} {dataset}"
        tasks = TASKS.get(dataset, (dataset,))
        evaluate = self._evaluate(name, str(run / "hf"), run / "eval", tasks)
        # What comes before is needed for this alone; its results may be gone (--discard_weights).
        before = [*(self._experts(method, dataset) if method in ESFT else ())]
        fields = self.overrides(method, dataset).items()
        command = [str(ROOT / "train.py"), "--config", str(ROOT / f"configs/{run.name}.py")]
        command += [f"--config.{field}={value}" for field, value in fields]
        # The loss curve is drawn when a run ends; one that SIGTERM stopped has none.
        before.append(Step(f"train {name}", command, (run / "loss.png").exists))
        export = ["-m", "convert.to_hf", "--checkpoint", str(run), "--output", str(run / "hf")]
        before.append(Step(f"export {name}", export, (run / "hf").exists))
        for step in before:
            yield dataclasses.replace(step, done=lambda s=step: evaluate.done() or s.done())
        yield dataclasses.replace(evaluate, weights=(run / "checkpoints", run / "hf"))

    def _experts(self, method: str, dataset: str) -> Iterator[Step]:
        from olmoe_jax.methods.experts import DEFAULT_TOP_P

        config = self.resolved(method, dataset)
        output = self.experts(method, dataset)
        scores = output.parent / "scores.json"
        command = ["-m", "olmoe_jax.esft", "score", "--model", self.model]
        command += ["--data", config.data.train_path, "--output", str(output.parent)]
        command += [f"--max_seq_length={config.data.max_seq_length}"]
        command += [f"--rows_per_device={config.train.rows_per_device}"]
        command += [f"--compute_dtype={config.model.compute_dtype}"]
        yield Step(f"score {dataset}", command, scores.exists)
        command = ["-m", "olmoe_jax.esft", "select", "--scores", str(scores)]
        command += ["--function", method.removeprefix("esft_"), f"--top_p={DEFAULT_TOP_P[method]}"]
        yield Step(f"select {method} {dataset}", [*command, "--output", str(output)], output.exists)

    def _evaluate(self, name: str, model: str, output: Path, tasks: Sequence[str]) -> Step:
        command = ["-m", "eval.run", "--model", model, "--tasks", ",".join(tasks)]
        command += ["--output", str(output), *(["--data", self.data] if self.data else [])]
        files = [output / task / RESULT for task in tasks]
        return Step(
            f"evaluate {name}",
            [*command, *self.evaluation],
            lambda: all(file.exists() for file in files),
        )


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    args, rest = parser().parse_known_args(arguments)
    config, evaluation = _forwarded(rest)
    plan = _plan(args, config, evaluation)
    for method in plan.methods:
        for dataset in plan.datasets:
            plan.resolved(method, dataset)
    eval_parser().parse_args(["--model", "m", "--tasks", "gsm", "--output", "o", *plan.evaluation])
    if "codealpaca" in plan.datasets and "--allow_code_execution" not in plan.evaluation:
        raise UserError(
            "codealpaca is evaluated by running programs that a model wrote: add "
            "--eval.allow_code_execution (they run in a sandbox, docs/evaluation.md), or name the "
            "other data sets with --datasets"
        )
    if args.data:
        _check_data(plan)
    if not (args.small or args.model):
        _check_accelerator()
    open_output(args.output, plan)
    runner = Runner(args.output)
    if args.small:
        from eval.reproduce_small import write_inputs

        write_inputs(args.output / "small", runner.run)
    steps = list(plan.steps())
    for number, step in enumerate(steps, 1):
        if not step.done():
            print(f"[{number}/{len(steps)}] {step.name}", flush=True)
            runner.run(step)
        for path in filter(Path.exists, step.weights if args.discard_weights else ()):
            shutil.rmtree(path)
    runs = [str(plan.run(m, d)) for d in plan.datasets for m in plan.methods]
    report = ["-m", "eval.report", f"base={plan.output}/base/eval", *runs]
    report += ["--output", str(args.output / "report")]
    runner.run(Step("report", report, lambda: True))


def parser() -> ArgumentParser:
    """The flags, without those that go to other commands."""
    result = ArgumentParser(prog="python -m eval.reproduce", description=__doc__, epilog=EXAMPLE)
    add = result.add_argument
    add("--output", required=True, type=Path, metavar="DIR")
    add("--methods", metavar="NAMES", help=f"some of {','.join(METHODS)}; default: all")
    add("--datasets", metavar="NAMES", help=f"some of {','.join(DATASETS)}; default: all")
    add("--model", metavar="DIR_OR_HUB_ID", help=f"to start from; default: {ModelOptions().path}")
    add("--data", metavar="DIR", help="local data files (docs/reproduce.md); default: the hub")
    add(
        "--small",
        action="store_true",
        help="a small model and generated word problems, minutes on a CPU; gsm alone, and by "
        "default conventional and esft_gate",
    )
    add(
        "--discard_weights",
        action="store_true",
        help="delete a cell's checkpoints and export once it is evaluated: all hold terabytes",
    )
    return result


def _check_accelerator() -> None:
    """In a process of its own: this one must leave the devices to the steps."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if found == "cpu":
        raise UserError(
            "jax sees no GPU or TPU here, and OLMoE-1B-7B needs them: add --small to see all steps "
            "with a small model, or name one with --model"
        )


def open_output(output: Path, plan: Plan) -> None:
    """Makes the directory, or makes sure that what it holds was made the same way.

    Raises:
      UserError: it was not (names what differs), or it is no directory of this command.
    """
    asked = {
        "model": plan.model,
        "data": plan.data,
        "config": dict(plan.config),
        "evaluation": list(plan.evaluation),
    }
    file = output / ASKED
    if file.exists():
        stored = directory.read_json(file)
        for name, value in asked.items():
            if stored.get(name) != value:
                raise UserError(
                    f"{output} was begun with {name}={json.dumps(stored.get(name))}, now it is "
                    f"{json.dumps(value)}; write another --output, or what it was begun with"
                )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is not of this command; write a new directory")
    try:
        output.mkdir(parents=True, exist_ok=True)
        directory.write_json(file, asked)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error.strerror})") from None


class Runner:
    """Runs steps as processes; a SIGTERM goes on to the one that runs and ends all after it."""

    def __init__(self, output: Path):
        self._process: subprocess.Popen | None = None
        self._stopped = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            # What one step compiled the next need not.
            "JAX_COMPILATION_CACHE_DIR": str((output / "compiled").absolute()),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        signal.signal(signal.SIGTERM, self._stop)

    def run(self, step: Step) -> None:
        """Raises:
        UserError: the command failed, or was stopped before its end.
        """
        print(" ".join(["python", *step.command]), flush=True)
        if not self._stopped:
            self._process = subprocess.Popen([sys.executable, *step.command], env=self._environment)
            code = self._process.wait()
        if self._stopped:
            raise UserError(f"SIGTERM while at: {step.name}; the same command continues there")
        if code or not step.done():
            how = f"failed with exit code {code}" if code else "stopped before its end"
            raise UserError(
                f"{step.name} {how}; see what it says above; the same command continues there"
            )

    def _stop(self, *_) -> None:
        self._stopped = True
        if self._process:
            self._process.terminate()


def _plan(args: argparse.Namespace, config: Mapping[str, str], evaluation: Sequence[str]) -> Plan:
    if args.small:
        from eval.reproduce_small import small_plan

        for name in ("model", "data"):
            if getattr(args, name):
                raise UserError(f"--{name}: --small makes its own; leave one of the two out")
        methods = _names(args.methods or "conventional,esft_gate", METHODS, "methods")
        if _names(args.datasets or "gsm", DATASETS, "datasets") != ["gsm"]:
            raise UserError(f"--datasets={args.datasets}: --small has gsm only; leave it out")
        return small_plan(args.output, methods, config, evaluation)
    model = args.model or ModelOptions().path
    dtype = config.get("model.compute_dtype", ModelOptions().compute_dtype)
    return Plan(
        args.output,
        _names(args.methods or ",".join(METHODS), METHODS, "methods"),
        _names(args.datasets or ",".join(DATASETS), DATASETS, "datasets"),
        model,
        args.data,
        config,
        [f"--compute_dtype={dtype}", *evaluation],
    )


def _names(text: str, known, flag: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--{flag}: there is no {name!r}; write some of {','.join(known)}")
    return names


def _local_files(data: str, dataset: str) -> list[Path]:
    """The rows to train on, and those of the eval loss where there are any."""
    own = (f"esft/train/{dataset}.jsonl", f"esft/eval/{dataset}.jsonl")
    return [Path(data) / file for file in LOCAL.get(dataset, own)]


def _check_data(plan: Plan) -> None:
    for dataset in plan.datasets:
        for file in _local_files(plan.data, dataset):
            if not file.exists():
                raise UserError(
                    f"--data {plan.data}: no {file.relative_to(plan.data)} there for {dataset}; "
                    "put the file there, or name the other data sets with --datasets"
                )


def _forwarded(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What goes to train.py as {field: text}, and the flags for eval.run."""
    config, evaluation = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        field = name.removeprefix("--config.")
        if name.startswith("--config.") and equals and field not in _OWN_FIELDS:
            config[field] = value
        elif name.startswith("--eval.") and name.removeprefix("--eval.") not in _OWN:
            evaluation.append(f"--{argument.removeprefix('--eval.')}")
        else:
            raise UserError(
                f"{argument}: unknown, or set by this command; flags of others are "
                "--config.FIELD=VALUE and --eval.NAME=VALUE (see python -m eval.reproduce --help)"
            )
    return config, evaluation


if __name__ == "__main__":
    run_command(main)
