"""One training step: gradients summed over micro-batches, then one AdamW update.

A step's loss is a SUM over its tokens. The data pipeline makes each token's weight, which holds
the division, so that micro-batches and devices only add.

Shapes: B rows, S positions, L layers, E experts, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import Olmoe, graph_of
from olmoe_jax.model.parameters import ROUTER, Parameters, merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.ops.routing import RouterStatistics, load_balancing_loss
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.optimizer import Optimizer, Schedule, clip_scale, global_norm

_UPDATE = np.uint32(2**32 - 1)
"""Tells the random key of a step's update from the keys of its micro-batches 0, 1, …"""


class TrainState(NamedTuple):
    """The state that an update changes and a checkpoint holds."""

    step: jax.Array  # int32: updates attempted; the loop's count of finished steps, on the devices
    parameters: Parameters  # the trained ones, in the dtypes of `parameters.kept_dtype`
    optimizer: Any  # the state of `Optimizer`
    skipped: jax.Array  # int32: updates skipped so far because something was not finite
    skipped_in_a_row: jax.Array  # int32: how many of the latest updates were skipped


class Accumulated(NamedTuple):
    """Sums over the micro-batches seen so far in a step."""

    gradients: Parameters  # in the parameters' dtypes
    loss: jax.Array  # float32, without the auxiliary loss
    statistics: RouterStatistics  # [L, …]


class StepMetrics(NamedTuple):
    """The numbers that a step reports; scalars are float32 or int32 on the devices."""

    loss: jax.Array
    grad_norm: jax.Array  # before clipping, over all trained parameters
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    statistics: RouterStatistics
    router_grad_norm: jax.Array | None  # before clipping; None: the router does not train


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The functions to compile for one run; everything static is here."""

    config: ModelConfig
    settings: ModelSettings  # how the model computes, and how its router learns
    optimizer: Optimizer
    schedule: Schedule  # maps the number of an update to its learning rate
    max_grad_norm: float | None  # the global norm to which gradients are clipped; None: no clipping
    aux_loss_coefficient: float = 0.0  # weight of the load-balancing loss; 0: there is none
    seed: int = 0  # seeds the adapters' dropout and stochastic rounding

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
        load: jax.Array | None = None,
        sums: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, RouterStatistics]]:
        """Returns a micro-batch's objective, and (its loss, router statistics) [L, …].

        The objective is the loss plus the weighted load-balancing loss. `dropout_key` is a scalar
        random key; None: no dropout. `load` is that of `accumulate`. `sums` is that of
        `Olmoe.hidden`.
        """
        model: Olmoe = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens, batch.segment_ids, batch.positions, dropout_key=dropout_key, sums=sums
        )
        with jax.named_scope("loss"):
            loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        objective = loss
        if self.aux_loss_coefficient:
            balance = load_balancing_loss(statistics, self.config.num_experts_per_token, load)
            objective += self.aux_loss_coefficient * balance
        return objective, (loss, statistics)

    def zero_sums(self, trained: Parameters) -> Accumulated:
        """Returns the sums before a step's first micro-batch; `trained` may be shapes."""
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
        load: jax.Array | None = None,
    ) -> Accumulated:
        """Adds a micro-batch's gradients, loss and statistics to the step's sums.

        `accumulated` is `zero_sums`, or what this function returned for the micro-batch before.
        `position` [2] uint32 is the step and the micro-batch in it: with the seed, they fix what
        dropout drops. `load` is the sum of `expert_load` over the step's micro-batches, which the
        load-balancing loss needs; None: this is the only one, or there is no such loss.
        """
        key = self._dropout_key(position)
        # The backward adds to the sums in place, layer by layer: a second copy of all gradients
        # never exists.
        gradients = jax.tree.map(jax.new_ref, accumulated.gradients)

        def loss(trained: Parameters) -> tuple[jax.Array, tuple[jax.Array, RouterStatistics]]:
            return self.loss(trained, frozen, batch, key, load, gradients)

        objective, backward, sums = jax.vjp(loss, trained, has_aux=True)
        backward.with_refs(gradients)(jnp.ones_like(objective))  # type: ignore[attr-defined]
        sums = jax.tree.map(jnp.add, (accumulated.loss, accumulated.statistics), sums)
        return Accumulated(jax.tree.map(jax.freeze, gradients), *sums)

    def expert_load(
        self, trained: Parameters, frozen: Parameters, batch: DeviceBatch, position: jax.Array
    ) -> jax.Array:
        """Returns how many tokens of a micro-batch choose each expert: [L, E] float32.

        The arguments are those of `accumulate`.
        """
        model: Olmoe = merge(self.graph, trained | frozen)
        key = self._dropout_key(position)
        rows = batch.tokens, batch.segment_ids, batch.positions
        return model.hidden(*rows, dropout_key=key)[1].load

    def update(self, state: TrainState, accumulated: Accumulated) -> tuple[TrainState, StepMetrics]:
        """Makes one AdamW update; if the loss or a gradient is not finite, changes no parameter."""
        # Clip to the global norm.
        norm = global_norm(accumulated.gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(accumulated.loss)
        scale = 1.0 if self.max_grad_norm is None else clip_scale(norm, self.max_grad_norm)
        # XLA fuses these float32 gradients into the update: they are never stored.
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, accumulated.gradients)

        # Update, or keep what was there.
        rate, old = self.schedule(state.step), (state.parameters, state.optimizer)
        key = self._key(state.step, _UPDATE)
        new = self.optimizer.update(gradients, state.optimizer, state.parameters, rate, key)
        parameters, optimizer = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        router = accumulated.gradients.get(ROUTER)
        next_state = TrainState(
            step=state.step + 1,
            parameters=parameters,
            optimizer=optimizer,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = StepMetrics(
            loss=accumulated.loss,
            grad_norm=norm,
            learning_rate=rate,
            skipped=next_state.skipped,
            skipped_in_a_row=next_state.skipped_in_a_row,
            statistics=accumulated.statistics,
            router_grad_norm=None if router is None else global_norm({ROUTER: router}),
        )
        return next_state, metrics

    def evaluate(
        self, trained: Parameters, frozen: Parameters, batch: DeviceBatch
    ) -> tuple[jax.Array, jax.Array]:
        """Returns a batch's loss, and the chosen experts [L, B, S, K] int32, the best first."""
        model: Olmoe = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        logits: Any = statistics.logits
        return loss, jax.lax.top_k(logits, self.config.num_experts_per_token)[1]

    def _dropout_key(self, position: jax.Array) -> jax.Array | None:
        """Returns the random key of a micro-batch's dropout; None: nothing is dropped."""
        drops = self.settings.lora and self.settings.lora.dropout
        return self._key(*position) if drops else None

    def _key(self, step: jax.Array, part: jax.Array | np.uint32) -> jax.Array:
        """Returns the random key of a part of a step: a micro-batch, or the update."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return jax.random.fold_in(key, part)


def initial_state(parameters: Parameters, optimizer: Optimizer) -> TrainState:
    """Returns the state before the first update."""
    zero = jnp.int32(0)
    return TrainState(zero, parameters, optimizer.init(parameters), zero, zero)


def changed_choices(chosen: jax.Array, before: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns the share of the tokens' experts that were not among their experts before.

    Args:
      chosen: [L, B, S, K] int32.
      before: [L, B, S, K] int32, of the same tokens.
      segment_ids: [B, S] int32, 0 for padding, which does not count.
    """
    is_new = ~(chosen[..., :, None] == before[..., None, :]).any(-1)
    is_token = jnp.broadcast_to((segment_ids > 0)[..., None], is_new.shape)
    return jnp.sum(is_new & is_token) / jnp.maximum(1, jnp.sum(is_token))
