"""The configuration of a run: every field, once, with its default, meaning and range.

A config file is Python that defines `get_config() -> Config`; `dataclasses.replace` makes a
variant of a Config.
"""

import typing
from dataclasses import dataclass, field
from typing import Literal

from olmoe_jax.config.fields import (
    AXIS_OR_REST,
    HUB_CONFIG,
    LORA_TARGETS,
    NAME,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_ZERO,
    SHARE_BELOW_ONE,
    SOURCES,
    SPLIT,
    UINT32,
    Field,
    at_least,
    between,
    option,
    path_or_id,
    read_fields,
)
from olmoe_jax.config.methods import METHODS
from olmoe_jax.data.chat import BOOKKEEPING


@dataclass(frozen=True)
class ModelOptions:
    """The network and the weights that it starts from."""

    path: str = option(
        "allenai/OLMoE-1B-7B-0125",
        "hub id or directory of the base model: a Hugging Face checkpoint or the output of "
        "convert.from_hf; with init=random this field only names the tokenizer",
        path_or_id("allenai/OLMoE-1B-7B-0125"),
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "source of the weights: model.path, or random numbers drawn by train.seed"
    )
    config_path: str | None = option(
        None,
        "the network's config.json, or a directory that holds one; required with init=random, "
        "refused with init=pretrained",
        path_or_id(),
    )
    compute_dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "type of activations and matmuls"
    )
    base_quantization: Literal["nf4", "int8"] | None = option(
        None,
        "LoRA only (QLoRA): storage of the frozen matrices of attention and experts, 4 or 8 bits a "
        "weight and a scale for each block of 64; default: compute_dtype",
    )
    remat: Literal["full", "selective", "none"] = option(
        "full",
        "what the backward recomputes: full recomputes every layer and needs the least memory; "
        "selective keeps the outputs of matmuls and attention; none keeps everything",
    )
    grouped_matmul: (
        Literal["auto", "blocked", "ragged_dot", "mosaic", "pallas_triton", "tokamax"] | None
    ) = option(
        None,
        "backend of the experts' matmuls; auto: on GPUs the fastest that is right at this run's "
        "sizes, which the run keeps; default: blocked on CPUs, mosaic on NVIDIA Hopper, "
        "pallas_triton on other NVIDIA GPUs, ragged_dot on TPUs",
    )
    attention: Literal["chunked", "pallas_triton", "cudnn", "splash"] | None = option(
        None,
        "backend of attention; default: chunked on CPUs, pallas_triton on NVIDIA GPUs, splash on "
        "TPUs",
    )
    allow_extrapolation: bool = option(
        False,
        "accept rows, and prompts with their answers, that are longer than the model has positions "
        "(max_position_embeddings of its config.json)",
    )


@dataclass(frozen=True)
class DataOptions:
    """The examples of training and evaluation, and how they become rows of tokens."""

    train_path: str = option(
        "",
        "training examples: a local .jsonl (.gz, .zst), .json, .parquet or .csv file, a folder or "
        "a pattern with *, or OWNER/NAME or OWNER/NAME:FILE on the hub; several with commas "
        "between, each PATH [weight=NUMBER] [config=NAME] [split=NAME], where an epoch takes each "
        "row weight times; must be set",
        SOURCES,
    )
    eval_path: str | None = option(
        None,
        "evaluation examples, named like train_path, but without weights; the split is test unless "
        "named; sources with name=NAME are a set whose loss is reported too; default: "
        "eval_fraction of the training examples",
        SOURCES,
    )
    eval_fraction: float = option(
        0.1,
        "share of the training examples held out for evaluation if eval_path is none; 0: no "
        "evaluation",
        SHARE_BELOW_ONE,
    )
    hub_config: str | None = option(
        None,
        "configuration of the data sets OWNER/NAME that have no config=; default: their own",
        HUB_CONFIG,
    )
    split: str | None = option(
        None,
        "split of the data sets OWNER/NAME of train_path that have no split=, or a slice of one, "
        "as train[:10%]; default: train",
        SPLIT,
    )
    tokenizer_path: str | None = option(
        None, "hub id or directory of the tokenizer; default: model.path", path_or_id()
    )
    chat_template: str | None = option(
        "auto",
        "Jinja file that turns conversations into text; auto: the tokenizer's own, if it has one; "
        "none: turns are joined like prompt and completion",
        path_or_id("auto"),
    )
    train_on: Literal["answers", "last_answer", "all"] = option(
        "answers",
        "what of an example trains: answers (what assistants write), the last answer only, or all "
        "of the text; an assistant turn with weight 0 or train false never does",
    )
    ignore_fields: str = option(
        BOOKKEEPING,
        "fields of rows and messages that count as absent, separated by commas; another field that "
        "has content and is not used is an error",
    )
    max_seq_length: int = option(
        4096, "tokens per row; a longer example loses its end", between(2, 2**20)
    )
    pack: bool = option(
        True, "put several examples into one row; changes the speed, not the mathematics"
    )


@dataclass(frozen=True)
class MethodOptions:
    """The parameters that train, and the way in which the router learns."""

    name: str = option(
        "densemixer",
        "; ".join(f"{name}: {row.help}" for name, row in METHODS.items()),
        choices=METHODS,
    )
    router_gradient_experts: int | None = option(
        None,
        "how many of the most probable experts get their router gradient, at least a token's top "
        "k; default: all experts, which is full DenseMixer",
        at_least(1),
    )
    router_gradient_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = option(
        None,
        "type of the factors of DenseMixer's extra matmuls (their sums are float32; with "
        "router_gradient_experts the results are rounded to this type); float8_e4m3fn is fast on "
        "H100s and later; default: the compute dtype",
    )
    lora_rank: int | None = option(
        None,
        "train adapters of this rank instead of the weights, and the router itself if it trains "
        "with this method; default: full fine-tuning",
        between(1, 2**16),
    )
    lora_alpha: float = option(
        16.0, "alpha: the adapters' product is multiplied by alpha / rank", POSITIVE
    )
    lora_dropout: float = option(
        0.1, "share of the adapters' inputs that training sets to zero", SHARE_BELOW_ONE
    )
    lora_targets: str = option(
        "q,k,v,o,gate,up,down",
        "matrices with an adapter: some of q, k, v, o (attention), gate, up, down (every expert)",
        LORA_TARGETS,
    )
    adapter_path: str | None = option(
        None,
        "PEFT adapter directory to start from (with its router.safetensors, if there is one), of "
        "this config's rank, alpha and targets; default: new adapters",
        path_or_id(),
    )
    experts_path: str | None = option(
        None,
        "expert config JSON that names the tuned experts; default: the method chooses them (ESFT "
        "scores the base on the training data); OUTPUT_DIR/experts.json keeps them in any case",
        path_or_id(),
    )
    esft_top_p: float | None = option(
        None,
        "share of a layer's score that the tuned experts hold together; default: the ESFT paper's, "
        "0.1 of the gate score or 0.2 of the token score",
        SHARE_ABOVE_ZERO,
    )
    esft_score_tokens: int = option(
        300_000, "tokens of the training data that score the experts", at_least(1)
    )
    esft_train_head: bool = option(
        True, "train lm_head too (with tied weights, the embedding), like the reference"
    )
    esft_densemixer: bool = option(
        False,
        "compute DenseMixer's router gradient, which reaches the layers below; the "
        "router's weight stays frozen unless the expert config says non_expert_modules",
    )
    router_aux_loss_coefficient: float = option(
        0.0,
        "weight of the load-balancing loss of the step's tokens; 0: none; above 0, a step of "
        "several micro-batches runs their forward passes twice",
        at_least(0),
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its learning rate schedule."""

    learning_rate: float = option(1e-6, "peak learning rate", POSITIVE)
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "decay after the warmup: to 0 at the last step, or none (constant)"
    )
    warmup_ratio: float = option(
        0.03, "share of all steps over which the learning rate rises from 0", SHARE
    )
    weight_decay: float = option(0.0, "decoupled weight decay", at_least(0))
    beta1: float = option(0.9, "decay per step of the first moment", SHARE_BELOW_ONE)
    beta2: float = option(0.999, "decay per step of the second moment", SHARE_BELOW_ONE)
    epsilon: float = option(1e-8, "added to the root of the second moment", POSITIVE)
    max_grad_norm: float | None = option(
        1.0, "global norm at which gradients are clipped; none: no clipping", POSITIVE
    )
    moments_dtype: Literal["float32", "bfloat16", "int8"] = option(
        "float32",
        "storage of both moments; bfloat16 and int8 (with a scale for each block of 256) round "
        "stochastically",
    )
    gradients_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "type in which gradients add up and the model reads its weights (router, norms and "
        "embedding: always float32); bfloat16 requires model.compute_dtype=bfloat16",
    )
    master_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "type in which the weights' updates add up; bfloat16 rounds stochastically and requires "
        "gradients_dtype=bfloat16",
    )


@dataclass(frozen=True)
class TrainOptions:
    """The run: its length, its output and what it keeps."""

    output_dir: str = option(
        "",
        "directory of checkpoints, metrics and exports; must be set (configs/ use "
        "runs/METHOD_DATASET)",
        path_or_id("runs/densemixer_gsm"),
    )
    batch_size: int = option(256, "examples per step", at_least(1))
    epochs: int = option(4, "passes over the training examples", at_least(1))
    max_steps: int | None = option(
        None, "stop after this many steps; default: after the last epoch", at_least(1)
    )
    seed: int = option(0, "seed of shuffling, held-out split and random weights", UINT32)
    loss_normalization: Literal["tokens", "microbatch"] = option(
        "tokens",
        "tokens: mean over the step's tokens; microbatch: the reference's mean of its "
        "micro-batches' means",
    )
    microbatch_examples: int = option(
        4,
        "examples per micro-batch of the reference, for loss_normalization=microbatch",
        at_least(1),
    )
    rows_per_device: int = option(
        1, "rows of data.max_seq_length tokens that a device processes at once", between(1, 2**12)
    )
    eval_every: int | None = option(
        None, "steps between evaluations; each epoch ends with one in any case", at_least(1)
    )
    checkpoint_every: int = option(100, "steps between checkpoints", at_least(1))
    keep_checkpoints: int = option(
        2, "how many of the latest checkpoints to keep, besides the best one", at_least(1)
    )
    best_metric: Literal["eval_loss", "exact_match"] = option(
        "eval_loss",
        "which number names the best checkpoint: the lowest eval_loss, or the highest exact_match "
        "(of the answers that generate.every decodes)",
    )
    max_nonfinite_steps: int = option(
        5,
        "stop when a non-finite loss or gradient has made the run skip this many updates in a row",
        at_least(1),
    )
    profile_steps: int = option(
        0,
        "steps that jax.profiler traces into OUTPUT_DIR/tensorboard, from the third on (the first "
        "two compile)",
        at_least(0),
    )
    wandb_project: str | None = option(
        None,
        "Weights & Biases project that gets what TensorBoard gets (pip install wandb; the key is "
        "read from $WANDB_API_KEY); default: none",
        NAME,
    )
    resume: Literal["auto", "restart"] = option(
        "auto",
        "auto: continue the run in output_dir, which must have this config; restart: set that run "
        "aside and start afresh",
    )
    export_hf: bool = option(
        True, "write the final model to OUTPUT_DIR/hf, adapters to OUTPUT_DIR/adapter"
    )
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = option(
        None,
        "dtype of exported models; default: the base's. What float16 cannot hold becomes float32",
    )
    export_best: bool = option(
        False, "write the best model by train.best_metric to OUTPUT_DIR/hf_best or adapter_best"
    )


@dataclass(frozen=True)
class MeshOptions:
    """The arrangement of the devices; data x fsdp x expert is their number."""

    data: int = option(1, "groups of devices that each hold a full copy of the state", at_least(1))
    fsdp: int = option(
        -1,
        "devices over which parameters and optimizer state are split; -1: all the remaining "
        "devices",
        AXIS_OR_REST,
    )
    expert: int = option(
        1,
        "devices over which the experts (and all that fsdp splits) are split: the tokens travel "
        "to the experts, not the experts to the tokens; must divide the number of experts",
        at_least(1),
    )


@dataclass(frozen=True)
class GenerateOptions:
    """Decoding of held-out prompts while a run trains, which shows what an eval loss does not."""

    every: int | None = option(
        None,
        "steps between greedy decodings of a held-out sample; the run ends with one in any case; "
        "default: no decoding",
        at_least(1),
    )
    examples: int = option(64, "evaluation examples in the sample", at_least(1))
    max_new_tokens: int = option(256, "length in tokens at which an answer is cut", at_least(1))


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    generate: GenerateOptions = field(default_factory=GenerateOptions)


@dataclass(frozen=True)
class Removed:
    """A field of earlier versions."""

    instead: str  # what a user writes instead
    default: bool | str | None = None  # the value with which an old run continues
    free: bool = False  # an old run continues with any value: the field changed no mathematics


_LESS_MEMORY = (
    "leave it out; for less memory write optimizer.moments_dtype=bfloat16 and "
    "optimizer.gradients_dtype=bfloat16"
)
REMOVED = {
    "data.cache_dir": Removed("set the environment variable OLMOE_JAX_CACHE", free=True),
    "generate.batch_size": Removed("leave it out; fewer generate.examples need less", free=True),
    "generate.scorer": Removed("leave it out; the expected answers say what must match"),
    "mesh.expert_exchange": Removed(
        "leave it out, or write mesh.fsdp instead of mesh.expert to exchange weights", free=True
    ),
    "method.lora_rslora": Removed("write method.lora_alpha=ALPHA*sqrt(RANK) as a number", False),
    "optimizer.fused_update": Removed(_LESS_MEMORY, False),
    "optimizer.offload": Removed(_LESS_MEMORY, False),
    "train.best_metric_mode": Removed("leave it out; train.best_metric says what is best"),
}


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS: dict[str, Field] = read_fields(SECTIONS)
