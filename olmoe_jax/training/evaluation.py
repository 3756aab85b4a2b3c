"""Evaluation while a run trains: the loss of held-out examples, and how far the routing moved."""

from collections.abc import Iterator

import jax

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.datasets import Datasets, row_layout
from olmoe_jax.training.program import Program
from olmoe_jax.training.step import changed_choices


class Evaluation:
    """The evaluation of a run's held-out examples.

    Args:
      config: of the run.
      examples: the held-out examples.
      datasets: of the run.
      program: with the parameters that the run starts from, whose routing is remembered.
    """

    def __init__(
        self,
        config: Config,
        examples: data.TokenizedDataset,
        datasets: Datasets,
        program: Program,
    ):
        self._examples, self._program = examples, program
        self._layout = row_layout(config, datasets, program.mesh)
        first = next(self._batches())
        self._first_choices = self._evaluate(program.state.parameters, first)[1]

    def run(self, trained: Parameters) -> tuple[float, float]:
        """Evaluates the model with these trained parameters.

        Returns:
          The mean loss per trained target, and the share of the first batch's routing choices that
          differ from those before training.
        """
        total, changed = 0.0, 0.0
        for number, batch in enumerate(self._batches()):
            loss, choices = self._evaluate(trained, batch)
            total += float(loss)
            if number == 0:
                compare = jax.jit(changed_choices)
                changed = float(compare(choices, self._first_choices, batch.segment_ids))
        return total / max(1, int(self._examples.target_counts.sum())), changed

    def _evaluate(self, trained: Parameters, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
        return self._program.evaluate(trained, self._program.frozen, batch)

    def _batches(self) -> Iterator[DeviceBatch]:
        batches = data.evaluation_batches(self._examples, **self._layout)
        return map(self._program.to_devices, batches)
