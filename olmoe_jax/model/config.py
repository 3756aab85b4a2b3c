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
    """The LoRA adapters: which matrices have one, and their size.

    Attributes:
      rank: R, columns of A and rows of B.
      alpha: the adapter's product is multiplied by alpha / R (alpha / sqrt(R) with `rslora`).
      dropout: share of the adapters' inputs that training sets to zero.
      targets: some of TARGETS.
      rslora: rank-stabilised scaling (https://arxiv.org/abs/2312.03732).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False

    @classmethod
    def of_method(cls, method: Mapping[str, Any]) -> "LoraSettings | None":
        """Returns the adapters that a run's `method` section asks for; None: it asks for none."""
        if method.get("lora_rank") is None:
            return None
        return cls(
            method["lora_rank"],
            method["lora_alpha"],
            method["lora_dropout"],
            tuple(target for target in TARGETS if target in method["lora_targets"].split(",")),
            method.get("lora_rslora", False),  # only in runs of earlier versions
        )

    @property
    def scale(self) -> float:
        """The factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How the model computes: gradients, dtypes and speed, and the parameters that a method adds.

    Attributes:
      compute_dtype: dtype of activations and matmuls; router, norms and softmaxes are float32.
      router_trains: False stops the gradient at the router's weight. x still gets its gradient
        through the router.
      dense_router_gradient: whether every expert's probability gets a gradient (DenseMixer, see
        `olmoe_jax.ops.router_gradient`), or those of a token's K experts alone.
      router_gradient_experts: with a dense router gradient, only the m most probable experts get
        theirs; None: every expert gets it.
      router_gradient_dtype: dtype of DenseMixer's extra matmuls; None: compute_dtype.
      remat: what the backward recomputes of a layer (see `olmoe_jax.ops.remat`).
      lora: adapters beside the weights; None: no adapters.
      tuned_experts: the tuned experts of each layer, whose weights are parameters of their own
        (`tuned.*`) and replace the base's; None: no such parameters.
      grouped_matmul: backend name of `olmoe_jax.ops.grouped_matmul`; None: the platform's.
      attention: backend name of `olmoe_jax.ops.attention`; None: the platform's.
    """

    compute_dtype: Any = jnp.float32
    router_trains: bool = True
    dense_router_gradient: bool = False
    router_gradient_experts: int | None = None
    router_gradient_dtype: str | None = None
    remat: Literal["full", "selective", "none"] = "none"
    lora: LoraSettings | None = None
    tuned_experts: tuple[tuple[int, ...], ...] | None = None
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
    result = ModelConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_layers=read.num_hidden_layers,
        num_heads=read.num_attention_heads,
        num_kv_heads=read.num_key_value_heads or read.num_attention_heads,
        head_dim=read.head_dim or read.hidden_size // read.num_attention_heads,
        num_experts=read.num_experts,
        num_experts_per_token=read.num_experts_per_tok,
        rope_theta=rope.rope_theta or read.rope_theta or 10000.0,
        rms_norm_eps=read.rms_norm_eps,
        norm_topk_prob=read.norm_topk_prob,
        clip_qkv=read.clip_qkv,
        tie_word_embeddings=read.tie_word_embeddings,
        pad_token_id=read.pad_token_id,
        initializer_range=read.initializer_range,
        max_position_embeddings=read.max_position_embeddings,
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
