"""The architecture of an OLMoE model, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import pydantic

from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT, Size, validate

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer that can have a LoRA adapter."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: it fixes the parameters' shapes and the forward function."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F, of one expert
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int  # E
    num_experts_per_token: int  # K
    rope_theta: float
    rms_norm_eps: float
    norm_topk_prob: bool = False
    clip_qkv: float | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The LoRA adapters: which matrices have one, and their size."""

    rank: int  # R, columns of A and rows of B
    alpha: float  # the adapter's product is multiplied by alpha / R
    dropout: float = 0.0  # share of the adapters' inputs that training sets to zero
    targets: tuple[str, ...] = TARGETS  # some of TARGETS

    @classmethod
    def of_method(cls, method: Mapping[str, Any]) -> "LoraSettings | None":
        """Returns the adapters that a run's `method` section asks for; None: it asks for none."""
        if (rank := method.get("lora_rank")) is None:
            return None
        # Runs of earlier versions can have the scale alpha / sqrt(R).
        factor = math.sqrt(rank) if method.get("lora_rslora") else 1
        return cls(
            rank,
            factor * method["lora_alpha"],
            method["lora_dropout"],
            tuple(target for target in TARGETS if target in method["lora_targets"].split(",")),
        )

    @property
    def scale(self) -> float:
        """The factor of the adapter's product."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How the model computes, and the parameters that a method adds."""

    compute_dtype: Any = jnp.float32  # of activations and matmuls; router, norms, softmax: float32
    # False stops the gradient at the router's weight. x still gets its gradient through the router.
    router_trains: bool = True
    # Whether probabilities of experts that were not chosen get a gradient too (DenseMixer, see
    # `olmoe_jax.ops.router_gradient`), and of which: the m most probable experts; None: of all.
    dense_router_gradient: bool = False
    router_gradient_experts: int | None = None
    router_gradient_dtype: str | None = None  # of DenseMixer's extra matmuls; None: compute_dtype
    # What the backward recomputes of a layer (see `olmoe_jax.ops.remat`).
    remat: Literal["full", "selective", "none"] = "none"
    lora: LoraSettings | None = None  # adapters beside the weights; None: no adapters
    # The tuned experts of each layer: parameters of their own (`tuned.*`) that get the gradients,
    # while the base's arrays hold their values for the forward; None: no such parameters.
    tuned_experts: tuple[tuple[int, ...], ...] | None = None
    # Backends of `olmoe_jax.ops.grouped_matmul` and `ops.attention`; None: the platform's.
    grouped_matmul: str | None = None
    attention: str | None = None


_Positive = Annotated[float, pydantic.Field(gt=0, le=1e12)]
_Optional = Size | None


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _RopeFile:
    """The object `rope_parameters` of transformers 5."""

    rope_type: str = "default"
    rope_theta: _Positive | None = None


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class _ConfigFile:
    """A config.json of transformers 4 or 5.

    Sizes are never defaulted: the defaults of transformers' class are not OLMoE-1B-7B's.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, pydantic.Field(gt=0, le=10_000)]
    num_attention_heads: Size
    num_experts: Annotated[int, pydantic.Field(gt=0, le=1 << 16)]
    num_experts_per_tok: Size
    num_key_value_heads: _Optional = None
    head_dim: _Optional = None
    rope_theta: _Positive | None = None
    rope_parameters: _RopeFile | None = None
    rms_norm_eps: Annotated[float, pydantic.Field(ge=0, le=1)] = 1e-5
    norm_topk_prob: bool = False
    clip_qkv: _Positive | None = None
    tie_word_embeddings: bool = False
    pad_token_id: Annotated[int, pydantic.Field(ge=-1, lt=2**31)] | None = None
    initializer_range: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.02
    max_position_embeddings: Size = 4096
    dtype: str | None = None  # of the stored weights
    torch_dtype: str | None = None  # the same, as transformers 4 calls it


def model_config_from_hf(config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Returns the architecture that a transformers 4 or 5 OLMoE configuration describes.

    Raises:
      UserError: another architecture, a field that is missing, of another type or out of range, or
        a feature that OLMoE does not have.
    """
    if config.get("model_type") != "olmoe":
        raise UserError(
            f"{source}: model_type is {config.get('model_type')!r}; this project trains OLMoE "
            "checkpoints (model_type 'olmoe')"
        )
    read = validate(_ConfigFile, dict(config), source)
    rope = read.rope_parameters or _RopeFile()
    unsupported = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "attention_dropout": bool(config.get("attention_dropout")),
        "rope_scaling (rope_type)": bool(config.get("rope_scaling")) or rope.rope_type != "default",
    }
    for field, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{source}: {field} is not a feature of the OLMoE models; remove it")
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    result = ModelConfig(
        **{name: value for name, value in vars(read).items() if name in names}
        | {
            "num_layers": read.num_hidden_layers,
            "num_heads": read.num_attention_heads,
            "num_kv_heads": read.num_key_value_heads or read.num_attention_heads,
            "head_dim": read.head_dim or read.hidden_size // read.num_attention_heads,
            "num_experts_per_token": read.num_experts_per_tok,
            "rope_theta": rope.rope_theta or read.rope_theta or 10000.0,
        }
    )
    _check_sizes(result, source)
    return result


def _check_sizes(config: ModelConfig, source: str) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{source}: {message}")

    require(
        config.num_heads % config.num_kv_heads == 0,
        f"num_attention_heads={config.num_heads} must be a multiple of "
        f"num_key_value_heads={config.num_kv_heads}",
    )
    require(
        config.num_experts_per_token <= config.num_experts,
        f"num_experts_per_tok={config.num_experts_per_token} must be at most "
        f"num_experts={config.num_experts}",
    )
    require(
        config.head_dim > 0 and config.head_dim % 2 == 0,
        f"head size {config.head_dim} must be even (rotary halves)",
    )
