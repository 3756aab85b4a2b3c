"""The comparison's runs: which there are, in which order, and where their results are kept."""

import dataclasses
import fcntl
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import pydantic

from benchmarks.comparison.base import EXPERTS_PER_TOKEN
from benchmarks.comparison.router_only import DENSE_ROUTER_ONLY, ROUTER_ONLY
from benchmarks.comparison.tasks import TARGETS
from configs.table import EXPERIMENTS, FULL
from olmoe_jax.files import STRICT, read_json_lines

RESULTS = "results.jsonl"
OTHER_EXPERTS_PER_TOKEN = (1, 2, 8)
LIMITED = {f"{FULL[-1]}_m{m}": m for m in (8, 16)}
"""DenseMixer with the router gradient of m experts."""
ABLATION = (ROUTER_ONLY, DENSE_ROUTER_ONLY)
RATE_SEED = 100
"""The seed of the runs that choose a learning rate; no other run has it."""

Bits = Annotated[str, pydantic.Field(pattern="^[01]*$")]
"""Right (1) and wrong (0) answers, row by row."""


class Cell(NamedTuple):
    """A run of fine-tuning."""

    experts_per_token: int
    method: str
    target: str
    seed: int
    rate: float | None = None  # None: the rate that validation chose


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run: a row of results.jsonl."""

    experts_per_token: int
    method: str
    target: str
    seed: int
    rate: float
    chooses_rate: bool  # True: a run on the validation rows, whose fields with a default are None
    right: Bits  # the target's answers
    loss: float  # the target's, the mean per token of an answer, in nats
    cpu_seconds: float  # measurements included
    known: dict[str, Bits]  # task of pretraining -> its answers
    changed_routing: float | None = None  # share of the tokens' experts, on the target, that is new
    # Cosine of the conventional router gradient with the dense one, at the end; None: the router
    # does not train.
    router_cosine: float | None = None
    trained: int | None = None  # parameters that train
    step_seconds: float | None = None  # the 10th percentile of a step's wall time
    peak_memory: int | None = None  # bytes of the process, its earlier runs included

    @property
    def cell(self) -> Cell:
        rate = self.rate if self.chooses_rate else None
        return Cell(self.experts_per_token, self.method, self.target, self.seed, rate)


@dataclasses.dataclass(frozen=True)
class Study:
    """The extent of a study."""

    pretrain_steps: int = 2000  # of the base with K = 4
    other_steps: int = 400  # of the bases with other K, which start from that base
    pretrain_rows: int = 16_000  # of each task, for the base with K = 4
    epochs: int = 6  # of fine-tuning
    targets: Sequence[str] = tuple(TARGETS)
    methods: Sequence[str] = EXPERIMENTS
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # from which validation chooses
    seeds: int = 5
    # The targets on which rates are chosen, and that `variants` and the other bases see.
    some_targets: Sequence[str] = ("descend", "back")
    other_experts_per_token: Sequence[int] = OTHER_EXPERTS_PER_TOKEN  # K of the other bases
    variants: Sequence[str] = (*LIMITED, *ABLATION)  # what else is fine-tuned with K = 4

    def stages(self) -> list[list[list[Cell]]]:
        """Returns all runs, in groups that share a process; a stage needs the stages before."""
        k = EXPERTS_PER_TOKEN
        tuned = [m for m in (*self.methods, *self.variants) if m == rate_method(m)]
        rates = self.rates if len(self.rates) > 1 else ()
        stages = [
            [
                [Cell(k, m, t, RATE_SEED, rate) for t in self.some_targets for rate in rates]
                for m in tuned
            ]
        ]
        for methods, ks, targets in (
            (self.methods, (k,), self.targets),
            (self.variants, (k,), self.some_targets),
            (FULL, self.other_experts_per_token, self.some_targets),
        ):
            stages.append(
                [
                    [Cell(other, method, target, seed) for target in targets]
                    for other in ks
                    for seed in range(self.seeds)
                    for method in methods
                ]
            )
        return [[group for group in groups if group] for groups in stages]

    def cells(self) -> list[Cell]:
        """Returns all runs, each after those that it needs."""
        return [cell for groups in self.stages() for group in groups for cell in group]


QUICK = Study(
    pretrain_steps=250,
    pretrain_rows=4000,
    epochs=3,
    targets=tuple(TARGETS)[:1],
    some_targets=tuple(TARGETS)[:1],
    methods=FULL[1:],
    rates=(1e-3,),
    seeds=2,
    other_experts_per_token=(),
    variants=(),
)


def rate_method(method: str) -> str:
    """Returns the method whose learning rate this one takes."""
    return FULL[-1] if method in LIMITED else method


def read(output: Path) -> dict[Cell, Result]:
    """Returns the results in a directory; {} if there are none."""
    file = output / RESULTS
    if not file.exists():
        return {}
    return {result.cell: result for result in read_json_lines(Result, file)}


def append(output: Path, result: Result) -> None:
    """Adds a result; a kill leaves the file as it was, or with the result."""
    file, partial = output / RESULTS, output / f".{RESULTS}.partial"
    row = {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
    with (output / f".{RESULTS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other groups add theirs
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        partial.write_text(before + json.dumps(row) + "\n", encoding="utf-8")
        partial.replace(file)


def chosen_rate(results: Mapping[Cell, Result], study: Study, cell: Cell) -> float:
    """Returns the method's rate with the lowest validation loss, the mean over `some_targets`.

    It is found with the base of K = 4, for all K and all targets.
    """
    if cell.rate is not None:
        return cell.rate
    if len(study.rates) == 1:
        return study.rates[0]

    def loss(rate: float) -> float:
        method = rate_method(cell.method)
        found = (Cell(EXPERTS_PER_TOKEN, method, t, RATE_SEED, rate) for t in study.some_targets)
        return statistics.mean(results[found_cell].loss for found_cell in found)

    return min(study.rates, key=loss)


def missing(group: Iterable[Cell], results: Mapping[Cell, Result]) -> list[Cell]:
    """Returns the runs of a group that have no result."""
    return [cell for cell in group if cell not in results]
