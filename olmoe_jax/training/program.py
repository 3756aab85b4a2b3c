"""A run's compiled functions, and the arrays that they start from."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.model import overlap
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.model.tuned import HOLDERS, hold_tuned
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.batch import DeviceBatch, place_batch
from olmoe_jax.parallel.compilation import compiler_options
from olmoe_jax.training.base_model import BaseModel
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.parameters import initial_parameters
from olmoe_jax.training.step import Accumulated, StepMetrics, Trainer, TrainState, initial_state


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The jitted functions of a step.

    Training calls them with arrays; `olmoe_jax.plan` compiles them for shapes.
    """

    trainer: Trainer
    initial: Any  # jitted `initial_state` of the trained parameters, which are donated
    zero_sums: Any  # jitted: () -> Accumulated
    expert_load: Callable[..., jax.Array]
    accumulate: Callable[..., Accumulated]
    update: Callable[..., tuple[TrainState, StepMetrics]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    hold_tuned: Callable[[Parameters, Parameters], Parameters] | None


@dataclasses.dataclass(frozen=True)
class Program(StepFunctions):
    """The functions of a run's steps and the arrays that they start from.

    If experts are tuned, `hold` changes the experts among `frozen`.
    """

    mesh: Mesh
    state: TrainState
    frozen: Parameters

    def step(
        self, state: TrainState, batches: Iterable[DeviceBatch], index: int
    ) -> tuple[TrainState, StepMetrics]:
        """Runs step number `index` on its micro-batches; `state` is donated."""
        state, metrics = self.update(state, self.sums(state.parameters, batches, index))
        self.hold(state.parameters)
        return state, metrics

    def hold(self, trained: Parameters) -> None:
        """Copies the tuned experts, if there are any, into `frozen`, where the model reads them.

        `step` does it after each update. Call it after any other change of trained parameters.
        """
        if self.hold_tuned:
            held = self.hold_tuned({name: self.frozen[name] for name in HOLDERS}, trained)
            self.frozen.update(held)

    def sums(self, trained: Parameters, batches: Iterable[DeviceBatch], index: int) -> Accumulated:
        """Returns the sums over the micro-batches of step number `index`."""
        parts: Iterable = ((b, np.array([index, n], np.uint32)) for n, b in enumerate(batches))
        load = None
        if self.trainer.aux_loss_coefficient and len(parts := list(parts)) > 1:
            # The load-balancing loss multiplies each probability with a share of the step's tokens:
            # the counts of all micro-batches must be known before the first gradient.
            load = sum(self.expert_load(trained, self.frozen, *part) for part in parts)
        accumulated = self.zero_sums()
        for part in parts:
            accumulated = self.accumulate(trained, self.frozen, accumulated, *part, load)
        return accumulated

    def to_devices(self, batch: data.Batch) -> DeviceBatch:
        """Places this process's rows as its part of the global batch."""
        return place_batch(batch, self.mesh)


def build_program(config: Config, model: BaseModel, mesh: Mesh, total_steps: int) -> Program:
    """Loads or draws the parameters and prepares the functions of a step (compiled when called)."""
    trained, frozen = initial_parameters(config, model, mesh)
    functions = step_functions(config, model.config, model.settings, trained, mesh, total_steps)
    state = functions.initial(trained)
    program = Program(**vars(functions), mesh=mesh, state=state, frozen=frozen)
    program.hold(state.parameters)
    return program


def step_functions(
    config: Config,
    model_config: ModelConfig,
    settings: ModelSettings,
    trained: Parameters,
    mesh: Mesh,
    total_steps: int,
) -> StepFunctions:
    """Returns the functions of a step.

    `settings` include the method's decisions, and `trained` may be shapes and dtypes. The learning
    rate needs `total_steps`, the run's.
    """
    options = config.optimizer
    trainer = Trainer(
        config=model_config,
        settings=settings,
        optimizer=adamw(
            options.beta1,
            options.beta2,
            options.epsilon,
            options.weight_decay,
            jnp.dtype(options.moments_dtype),
            jnp.dtype(options.master_dtype),
        ),
        schedule=schedule(
            options.schedule,
            options.learning_rate,
            int(total_steps * options.warmup_ratio),
            total_steps,
        ),
        max_grad_norm=options.max_grad_norm,
        aux_loss_coefficient=config.method.router_aux_loss_coefficient,
        seed=config.train.seed,
    )
    replicated: Any = NamedSharding(mesh, P())
    by_name = sharding.parameter_shardings(parameter_specs(model_config, settings), mesh)
    gradients: Any = {name: by_name[name] for name in trained}
    sums = Accumulated(gradients, replicated, replicated)
    state = _state_shardings(trainer, trained, by_name, mesh)
    platform, ahead = mesh.devices.flat[0].platform, overlap.serves(mesh, settings.remat)
    jit: Any = functools.partial(jax.jit, compiler_options=compiler_options(platform, ahead))
    # Not the arrays: what a function closes over stays alive.
    shapes: Any = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in trained.items()}
    hold = None
    if settings.tuned_experts and any(settings.tuned_experts):
        hold = jit(
            functools.partial(hold_tuned, tuned_experts=settings.tuned_experts),
            donate_argnums=0,
            out_shardings={name: by_name[name] for name in HOLDERS},
        )
    return StepFunctions(
        trainer,
        initial=jax.jit(
            functools.partial(initial_state, optimizer=trainer.optimizer),
            donate_argnums=0,
            out_shardings=state,
        ),
        zero_sums=jit(functools.partial(trainer.zero_sums, shapes), out_shardings=sums),
        expert_load=jit(trainer.expert_load, out_shardings=replicated),
        accumulate=jit(trainer.accumulate, donate_argnums=2, out_shardings=sums),
        update=jit(trainer.update, donate_argnums=0, out_shardings=(state, replicated)),
        evaluate=jit(trainer.evaluate),
        hold_tuned=hold,
    )


def _state_shardings(
    trainer: Trainer, trained: Parameters, by_name: dict[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Returns the shardings of a run's state, a tree of `NamedSharding`.

    Moments lie with their parameters. `by_name` are the parameters' shardings.
    """
    replicated = NamedSharding(mesh, P())

    def place(path: tuple, _: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if not names:
            return replicated
        where = by_name[names[-1]]
        if path[-1] == jax.tree_util.GetAttrKey("scales"):
            # One scale for each block of the last dimension, which need not divide.
            where = NamedSharding(mesh, P(*where.spec[:-1]))
        return where

    state = jax.eval_shape(lambda p: initial_state(p, trainer.optimizer), trained)
    return jax.tree_util.tree_map_with_path(place, state)
