"""The table of weight names: what this project and what Hugging Face call each weight of OLMoE.

This project stacks a weight over the layers [L, …] and experts [L, E, …] and keeps matrices as
[in, out]. Hugging Face stores one tensor for each layer and expert, and matrices as torch's
[out, in]. Most of OLMoE's matrices are square, so that no shape check sees a missing transpose:
conversion goes by name.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.tuned import HOLDERS, places


@dataclasses.dataclass(frozen=True)
class Weight:
    """One kind of weight: all layers' q matrices, say."""

    name: str  # of the parameter in this project
    hf_name: str  # of the tensors, with {layer} and {expert} where there is one tensor for each
    transpose: bool = False  # whether Hugging Face stores the matrix as [out, in]
    fused_name: str | None = None  # of the tensor of all experts of a layer in transformers 5
    # The place, 0 or 1, in a fused tensor that stacks two weights in the output dimension.
    fused_part: int | None = None

    @property
    def per_layer(self) -> bool:
        """True for a weight of every layer; False for the embedding, the last norm and the head."""
        return "{layer}" in self.hf_name

    @property
    def per_expert(self) -> bool:
        """True for a weight that every expert of a layer has."""
        return "{expert}" in self.hf_name

    def tensor_name(self, layer: int | None, expert: int | None = None) -> str:
        """Returns the Hugging Face name of one tensor."""
        return self.hf_name.format(layer=layer, expert=expert)


_LAYER = "model.layers.{layer}."
_EXPERTS = _LAYER + "mlp.experts."
TABLE = (
    Weight("embed", "model.embed_tokens.weight"),
    *(
        Weight(f"layers.attention.{name}", f"{_LAYER}self_attn.{name}_proj.weight", transpose=True)
        for name in "qkvo"
    ),
    Weight("layers.attention.q_norm", _LAYER + "self_attn.q_norm.weight"),
    Weight("layers.attention.k_norm", _LAYER + "self_attn.k_norm.weight"),
    Weight("layers.moe.router", _LAYER + "mlp.gate.weight", transpose=True),
    *(
        Weight(
            f"layers.moe.experts.{name}",
            f"{_EXPERTS}{{expert}}.{name}_proj.weight",
            transpose=True,
            fused_name=_EXPERTS + fused_name,
            fused_part=part,
        )
        for name, fused_name, part in (
            ("gate", "gate_up_proj", 0),
            ("up", "gate_up_proj", 1),
            ("down", "down_proj", None),
        )
    ),
    Weight("layers.attention_norm", _LAYER + "input_layernorm.weight"),
    Weight("layers.moe_norm", _LAYER + "post_attention_layernorm.weight"),
    Weight("norm", "model.norm.weight"),
    Weight("lm_head", "lm_head.weight"),
)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weights that a model of this architecture has."""
    # The logits of a model with tied embeddings come from the embedding.
    return tuple(w for w in TABLE if w.name != "lm_head" or not config.tie_word_embeddings)


def layer_indices(weight: Weight, config: ModelConfig) -> list[int | None]:
    """Returns the layers that have the weight; [None] for a weight outside the layers."""
    return list(range(config.num_layers)) if weight.per_layer else [None]


def layer_shape(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of one layer's weight; outside the layers, of the whole weight."""
    shape = parameter_specs(config)[weight.name].shape
    return shape[1:] if weight.per_layer else shape


def hf_shape(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of one Hugging Face tensor of the weight."""
    shape = layer_shape(weight, config)
    if weight.per_expert:
        shape = shape[1:]
    return shape[::-1] if weight.transpose else shape


def tensor_names(weight: Weight, layer: int | None, config: ModelConfig) -> list[str]:
    """Returns the names of one layer's tensors: one name, or one for each expert."""
    experts = range(config.num_experts) if weight.per_expert else [None]
    return [weight.tensor_name(layer, expert) for expert in experts]


def to_hf(weight: Weight, layer: int | None, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face's names and tensors (views) of one layer's weight."""
    for expert, matrix in enumerate(value) if weight.per_expert else [(None, value)]:
        yield weight.tensor_name(layer, expert), matrix.T if weight.transpose else matrix


def all_to_hf(
    parameters: dict[str, np.ndarray], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face's names and tensors (views) of a model's parameters, or of some."""
    for weight in weights(config):
        if weight.name in parameters:
            stacked = parameters[weight.name]
            for layer in layer_indices(weight, config):
                yield from to_hf(weight, layer, stacked if layer is None else stacked[layer])


def tuned_to_hf(
    parameters: dict[str, np.ndarray], tuned_experts: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face's names and tensors (views) of the tuned experts.

    Args:
      parameters: `tuned.gate`, `tuned.up` [U, D, F] and `tuned.down` [U, F, D], U experts of all
        layers one after the other; other parameters are left out.
      tuned_experts: the ids of each layer's tuned experts.
    """
    for weight in TABLE:
        stack = HOLDERS.get(weight.name)
        if stack in parameters:
            for (layer, expert), matrix in zip(
                places(tuned_experts), parameters[stack], strict=True
            ):
                yield weight.tensor_name(layer, expert), matrix.T
