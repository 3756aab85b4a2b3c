"""The one table of weight names: ours on the left, Hugging Face's on the right.

Ours are stacked over layers [L, …] and experts [L, E, …] with matrices as [in, out]; Hugging
Face's are one tensor per layer and expert with matrices as torch's [out, in]. OLMoE's matrices
are often square, so a missing transpose is invisible to a shape check: conversion goes by key.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.tuned import places


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight.

    Attributes:
      ours: the parameter's name in `olmoe_jax.model.parameters`.
      theirs: Hugging Face's name, with {layer} and {expert} where there is one tensor for each.
      transpose: whether the matrix is stored the other way round there.
      fused: for expert weights, where transformers 5 keeps all experts of a layer in one tensor:
        its name; `fused_part` is the slice (0 or 1) of the two stacked in its output dimension.
    """

    ours: str
    theirs: str
    transpose: bool = False
    fused: str | None = None
    fused_part: int | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.theirs

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.theirs


_LAYER = "model.layers.{layer}."
_EXPERTS = _LAYER + "mlp.experts."
TABLE = (
    Row("embed", "model.embed_tokens.weight"),
    *(
        Row(f"layers.attention.{ours}", f"{_LAYER}self_attn.{ours}_proj.weight", transpose=True)
        for ours in "qkvo"
    ),
    Row("layers.attention.q_norm", _LAYER + "self_attn.q_norm.weight"),
    Row("layers.attention.k_norm", _LAYER + "self_attn.k_norm.weight"),
    Row("layers.moe.router", _LAYER + "mlp.gate.weight", transpose=True),
    *(
        Row(
            f"layers.moe.experts.{ours}",
            f"{_EXPERTS}{{expert}}.{ours}_proj.weight",
            True,
            _EXPERTS + ("down_proj" if part is None else "gate_up_proj"),
            part,
        )
        for ours, part in (("gate", 0), ("up", 1), ("down", None))
    ),
    Row("layers.attention_norm", _LAYER + "input_layernorm.weight"),
    Row("layers.moe_norm", _LAYER + "post_attention_layernorm.weight"),
    Row("norm", "model.norm.weight"),
    Row("lm_head", "lm_head.weight"),
)


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The table's rows that a model of this architecture has."""
    return tuple(row for row in TABLE if row.ours != "lm_head" or not config.tie_word_embeddings)


def layer_indices(row: Row, config: ModelConfig) -> list[int | None]:
    """The layers a row stands for; [None] for a weight outside the layers."""
    return list(range(config.num_layers)) if row.per_layer else [None]


def layer_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Our shape of one layer's weight (of the whole weight, outside the layers)."""
    shape = parameter_specs(config)[row.ours].shape
    return shape[1:] if row.per_layer else shape


def hf_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one Hugging Face tensor of this row (per expert where there are experts)."""
    shape = layer_shape(row, config)
    if row.per_expert:
        shape = shape[1:]
    return shape[::-1] if row.transpose else shape


def to_hf(row: Row, layer: int | None, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Splits one layer's weight, in our layout, into Hugging Face tensors (views)."""
    if not row.per_expert:
        yield row.theirs.format(layer=layer), value.T if row.transpose else value
        return
    for expert, matrix in enumerate(value):
        yield row.theirs.format(layer=layer, expert=expert), matrix.T


def all_to_hf(
    parameters: dict[str, np.ndarray], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face names and tensors (views) of a flat dict, which may lack parameters."""
    for row in rows(config):
        if row.ours in parameters:
            value = parameters[row.ours]
            for layer in layer_indices(row, config):
                yield from to_hf(row, layer, value if layer is None else value[layer])


def tuned_to_hf(
    parameters: dict[str, np.ndarray], tuned_experts: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face names and tensors (views) of ESFT's pack (`tuned.gate` [N, D, F], …)."""
    for row in TABLE:
        if row.per_expert and (name := tuned_name(row)) in parameters:
            for (layer, expert), matrix in zip(
                places(tuned_experts), parameters[name], strict=True
            ):
                yield row.theirs.format(layer=layer, expert=expert), matrix.T


def tuned_name(row: Row) -> str:
    """The pack's parameter that holds a row's selected experts."""
    return f"tuned.{row.ours.rsplit('.', 1)[-1]}"
