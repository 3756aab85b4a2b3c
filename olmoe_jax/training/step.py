"""One training step: gradients summed over micro-batches, then one update.

A step's loss is a SUM over its tokens; the weights made by the data pipeline hold the division,
so micro-batches and devices only ever add. R rows, S positions, L layers, E experts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import Olmoe, graph_of, load_balancing_loss
from olmoe_jax.model.parameters import ROUTER, Parameters, merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.ops.routing import RouterStatistics
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.optimizer import Optimizer, Schedule, clip_scale, global_norm


class TrainState(NamedTuple):
    """What an update changes, and a checkpoint holds."""

    step: jax.Array  # int32: updates attempted
    parameters: Parameters  # the trained ones, in the dtypes of `setup.kept_dtype`
    optimizer: Any  # of `Optimizer.init`
    skipped: jax.Array  # int32: updates skipped so far because something was not finite
    skipped_in_a_row: jax.Array  # int32


class Accumulated(NamedTuple):
    """Sums over the micro-batches seen so far in a step."""

    gradients: Parameters  # in the parameters' dtypes
    loss: jax.Array  # float32, without the auxiliary loss
    statistics: RouterStatistics  # [L, …]


class StepMetrics(NamedTuple):
    """What a step reports; scalars are float32 or int32 on the devices."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    statistics: RouterStatistics
    router_grad_norm: jax.Array | None  # before clipping, over all layers; None: it does not train


def changed_choices(chosen: jax.Array, before: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The share of the tokens' experts that were not among these tokens' experts before.

    Args:
      chosen, before: [L, B, S, K] int32.
      segment_ids: [B, S] int32, 0 for padding, which does not count.
    """
    is_new = ~(chosen[..., :, None] == before[..., None, :]).any(-1)
    is_token = jnp.broadcast_to((segment_ids > 0)[..., None], is_new.shape)
    return jnp.sum(is_new & is_token) / jnp.maximum(1, jnp.sum(is_token))


def initial_state(parameters: Parameters, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    zero = jnp.int32(0)
    return TrainState(zero, parameters, optimizer.init(parameters), zero, zero)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The functions to compile for one run; everything static is here.

    Attributes:
      config: the architecture.
      settings: how the model computes.
      optimizer: makes the updates.
      schedule: gives the learning rate of an update.
      max_grad_norm: clip the gradients to this global norm; None: do not.
      aux_loss_coefficient: weight of the load-balancing loss in the objective.
      seed: of the adapters' dropout and of stochastic rounding.
    """

    config: ModelConfig
    settings: ModelSettings
    optimizer: Optimizer
    schedule: Schedule
    max_grad_norm: float | None
    aux_loss_coefficient: float = 0.0
    seed: int = 0

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The model's structure."""
        return graph_of(self.config, self.settings)

    def loss(
        self,
        trained: Parameters,
        frozen: Parameters,
        batch: DeviceBatch,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, RouterStatistics]]:
        """The objective of a micro-batch, and its (loss, router statistics)."""
        model = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            dropout_key=dropout_key,
        )
        objective, loss = self.objective(model, hidden, statistics, batch)
        return objective, (loss, statistics)

    def objective(
        self, model: Olmoe, hidden: jax.Array, statistics: RouterStatistics, batch: DeviceBatch
    ) -> tuple[jax.Array, jax.Array]:
        """The objective and the loss of final hidden states [R, S, D]."""
        with jax.named_scope("loss"):
            loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        objective = loss
        if self.aux_loss_coefficient:
            share = jnp.sum(batch.loss_weights)
            balance = load_balancing_loss(statistics, self.config)
            objective += self.aux_loss_coefficient * share * balance
        return objective, loss

    def evaluate(
        self, trained: Parameters, frozen: Parameters, batch: DeviceBatch
    ) -> tuple[jax.Array, jax.Array]:
        """A batch's loss, and which experts are chosen: [L, B, S, K] int32, the best first."""
        model = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        return loss, jax.lax.top_k(statistics.logits, self.config.num_experts_per_token)[1]

    def zero_sums(self, trained: Parameters) -> Accumulated:
        """What `accumulate` adds a step's first micro-batch to; `trained` may be shapes."""
        experts = jnp.zeros((self.config.num_layers, self.config.num_experts))
        statistics = RouterStatistics(experts, experts, jnp.zeros(self.config.num_layers), None)
        gradients = {name: jnp.zeros(value.shape, value.dtype) for name, value in trained.items()}
        return Accumulated(gradients, jnp.zeros(()), statistics)

    def accumulate(
        self,
        trained: Parameters,
        frozen: Parameters,
        accumulated: Accumulated,
        batch: DeviceBatch,
        position: jax.Array,
    ) -> Accumulated:
        """Adds a micro-batch's gradients, loss and statistics to the step's, at first `zero_sums`.

        `position`: [2] uint32, the step and the micro-batch in it; with the seed, it fixes what
        dropout drops.
        """
        key = self.dropout_key(position)

        def loss(trained):
            return self.loss(trained, frozen, batch, key)

        objective, backward, sums = jax.vjp(loss, trained, has_aux=True)
        # Added in place, layer by layer: a second copy of all gradients never exists.
        gradients = jax.tree.map(jax.new_ref, accumulated.gradients)
        backward.with_refs(gradients)(jnp.ones_like(objective))
        sums = jax.tree.map(jnp.add, (accumulated.loss, accumulated.statistics), sums)
        return Accumulated(jax.tree.map(jax.freeze, gradients), *sums)

    def dropout_key(self, position: jax.Array) -> jax.Array | None:
        """The key of a micro-batch's dropout, where there is one; `position` as above."""
        if not (self.settings.lora and self.settings.lora.dropout):
            return None
        key = jax.random.key(self.seed)
        for number in position:
            key = jax.random.fold_in(key, number)
        return key

    def update(self, state: TrainState, accumulated: Accumulated) -> tuple[TrainState, StepMetrics]:
        """One AdamW update; when the loss or the gradients are not finite, none."""
        gradients = accumulated.gradients
        norm = global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(accumulated.loss)
        scale = 1.0 if self.max_grad_norm is None else clip_scale(norm, self.max_grad_norm)
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        # Apart from the keys of the step's micro-batches, see `dropout_key`.
        key = jax.random.fold_in(key, np.uint32(2**32 - 1))
        # Never stored.
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
        rate, old = self.schedule(state.step), (state.parameters, state.optimizer)
        new = self.optimizer.update(gradients, state.optimizer, state.parameters, rate, key)
        parameters, optimizer = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        new = TrainState(
            state.step + 1,
            parameters,
            optimizer,
            state.skipped + jnp.where(finite, 0, 1),
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        router = {name: g for name, g in accumulated.gradients.items() if name == ROUTER}
        metrics = StepMetrics(
            accumulated.loss,
            norm,
            rate,
            new.skipped,
            new.skipped_in_a_row,
            accumulated.statistics,
            global_norm(router) if router else None,
        )
        return new, metrics
