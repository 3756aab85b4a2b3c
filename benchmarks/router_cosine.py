"""How well a router gradient agrees with exact DenseMixer's, and the loss on held-out rows."""

from pathlib import Path

import jax
import numpy as np

from olmoe_jax import data
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.olmoe import Olmoe
from olmoe_jax.model.parameters import split
from olmoe_jax.training.methods import ROUTER
from olmoe_jax.training.step import DeviceBatch, Trainer


def router_cosines(model: Olmoe, batch: DeviceBatch) -> dict[str, float]:
    """Cosine of DenseMixer's router gradient for m experts with the exact one, by m.

    m is K, 2K, 4K and E (K of E experts are selected); m = K is the conventional gradient. The
    gradient is of all layers' router weights, as one vector.
    """
    per_token, experts = model.config.num_experts_per_token, model.config.num_experts
    limits = sorted({min(per_token * factor, experts) for factor in (1, 2, 4)} | {experts})
    gradients = {limit: _router_gradient(model, batch, limit) for limit in limits}
    exact = gradients[experts]
    norm = np.linalg.norm
    return {str(m): float(g @ exact / (norm(g) * norm(exact))) for m, g in gradients.items()}


def _router_gradient(model: Olmoe, batch: DeviceBatch, limit: int) -> np.ndarray:
    """DenseMixer's gradient with m = `limit`, float64 [L * D * E]."""
    frozen = split(model)[1]
    router = {ROUTER: frozen.pop(ROUTER)}
    trainer = _trainer(model, router_method="densemixer", router_gradient_experts=limit)
    gradients, _ = jax.jit(jax.grad(trainer.loss, has_aux=True))(router, frozen, batch)
    return np.asarray(gradients[ROUTER], np.float64).ravel()


def held_out_batches(inputs: Path, row_length: int, rows: int) -> tuple[list[DeviceBatch], int]:
    """`inputs`/eval.jsonl in packed batches [rows, row_length], and the number of its targets."""
    tokenizer = data.load_tokenizer(str(inputs))
    dataset = data.tokenize_dataset(str(inputs / "eval.jsonl"), tokenizer, row_length, None)
    batches = data.evaluation_batches(
        dataset,
        max_seq_length=row_length,
        pack=True,
        rows_per_batch=rows,
        pad_id=tokenizer.pad_token_id,
    )
    fields = DeviceBatch._fields
    return [DeviceBatch(*(getattr(b, name) for name in fields)) for b in batches], int(
        dataset.target_counts.sum()
    )


def held_out_loss(model: Olmoe, batches: list[DeviceBatch], targets: int) -> float:
    """Loss per target."""
    loss, parameters = jax.jit(_trainer(model).loss), split(model)[1]
    return sum(float(loss({}, parameters, batch)[0]) for batch in batches) / targets


def _trainer(model: Olmoe, **settings) -> Trainer:
    """For losses and gradients alone."""
    return Trainer(model.config, ModelSettings(**settings), None, None, 1.0)
