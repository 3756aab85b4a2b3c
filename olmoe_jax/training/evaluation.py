"""Evaluation while a run trains: the loss of held-out examples, and how far the routing moved."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.datasets import Datasets, row_layout
from olmoe_jax.training.program import Program
from olmoe_jax.training.step import changed_choices


class Evaluated(NamedTuple):
    """The result of an evaluation. Losses are means per trained target."""

    loss: float
    changed: float  # the share of the first batch's routing choices that training changed
    sets: dict[str, float]  # the loss of each set that has a name


class Evaluation:
    """The evaluation of a run's held-out examples.

    `program` has the parameters that the run starts from, whose routing is remembered.
    """

    def __init__(
        self,
        config: Config,
        examples: data.TokenizedDataset,
        datasets: Datasets,
        program: Program,
    ):
        self._sets, self._program = examples.sets(), program
        self._layout = row_layout(config, datasets, program.mesh)
        first = next(self._batches(next(iter(self._sets.values()))))
        self._first_choices = self._evaluate(program.state.parameters, first)[1]

    def run(self, trained: Parameters) -> Evaluated:
        """Evaluates the model with these trained parameters."""
        totals: dict[str | None, float] = {}
        changed = None
        for name, examples in self._sets.items():
            totals[name] = 0.0
            for batch in self._batches(examples):
                loss, choices = self._evaluate(trained, batch)
                totals[name] += float(loss)
                if changed is None:
                    compare = jax.jit(changed_choices)
                    changed = float(compare(choices, self._first_choices, batch.segment_ids))
        targets = {name: int(part.target_counts.sum()) for name, part in self._sets.items()}
        return Evaluated(
            loss=sum(totals.values()) / max(1, sum(targets.values())),
            changed=changed or 0.0,
            sets={name: totals[name] / max(1, targets[name]) for name in totals if name},
        )

    def _evaluate(self, trained: Parameters, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
        return self._program.evaluate(trained, self._program.frozen, batch)

    def _batches(self, examples: data.TokenizedDataset) -> Iterator[DeviceBatch]:
        batches = data.evaluation_batches(examples, **self._layout)
        return map(self._program.to_devices, batches)
