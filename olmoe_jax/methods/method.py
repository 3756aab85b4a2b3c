"""The decisions of a method in a run: the base class of all methods, which is `conventional`.

A run asks its method: what trains (`trains`), how does the router learn and which parameters are
added (`model_settings`), what must hold (`check`), what comes first (`prepare`; `for_plan`, where
there is no data), where do added parameters start (`added_parameters`), what is reported
(`describe`), and what is written at the end (`export`). No other code asks for a method's name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from olmoe_jax.checkpoints.export import export_hf
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.config import MethodOptions
from olmoe_jax.data import TokenizedDataset
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.parameters import ROUTER, Parameters


class Base(NamedTuple):
    """The base model's parameters, from which added parameters may start."""

    source: Source | None  # the checkpoint; None: the parameters were drawn at random
    parameters: Parameters
    draw: Callable[[Callable[[str], bool]], Parameters]  # draws the parameters of these names


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The things that a method may look at before a run's parameters are made."""

    output: Path  # the run's directory
    source: Source | None  # the base's checkpoint; None: random weights of `seed`
    settings: ModelSettings  # how the model computes
    mesh: Mesh
    dataset: TokenizedDataset  # the training examples
    layout: dict[str, Any]  # how examples become rows (`olmoe_jax.training.datasets.row_layout`)
    seed: int  # of the run


class Method:
    """Conventional full fine-tuning: every weight trains, the router through the top-k experts.

    A subclass says what differs.
    """

    dense_router_gradient = False
    """True if experts beyond the top k give the router a gradient: all, or the m most probable."""
    export_name: str = "hf"
    """The folder of a run's directory that `export` writes."""

    def __init__(self, options: MethodOptions, config: ModelConfig):
        self.options, self.config = options, config

    def model_settings(self, settings: ModelSettings) -> ModelSettings:
        """Returns the settings with everything that the method decides."""
        return dataclasses.replace(
            settings,
            router_trains=self.trains(ROUTER),
            dense_router_gradient=self.dense_router_gradient,
            router_gradient_experts=self.options.router_gradient_experts,
            router_gradient_dtype=self.options.router_gradient_dtype,
        )

    def trains(self, name: str) -> bool:
        """Returns whether the parameter `name` trains.

        The router's weight is the parameter `ROUTER`. If it does not train, gradient still reaches
        x through the router.
        """
        return True

    def check(self) -> None:
        """Checks the files that the options name, before anything is written.

        Raises:
          UserError: a file does not fit the model or the options.
        """

    def prepare(self, run: Preparation) -> Self:
        """Returns the method, ready to train; called once, with the run's directory open."""
        return self

    def for_plan(self, seed: int, experts_per_layer: int) -> tuple[Self, int | None]:
        """Returns the method as a plan sees it, and how many tuned experts per layer it assumes.

        A plan prepares nothing. Where only data can tell which experts are tuned, it assumes
        `experts_per_layer` of them. None: nothing is assumed.
        """
        return self, None

    def added_parameters(self, base: Base) -> Mapping[str, jax.Array | np.ndarray]:
        """Returns the first values of the parameters that the method adds, by name."""
        return {}

    def describe(self) -> str:
        """Returns the method in a line's words."""
        m = self.options.router_gradient_experts
        if m is None:
            return self.options.name
        same = ", as conventional" if m == self.config.num_experts_per_token else ""
        return f"{self.options.name} ({m} experts' router gradient{same})"

    def export(self, run: RunCheckpoint, target: Path) -> None:
        """Writes what the run trained into the new directory `target`, in the base's dtype."""
        export_hf(run, target, None)
