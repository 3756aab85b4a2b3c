"""The configuration of a run: typed fields, each declared once with its default, meaning and range.

A config file is Python that defines `get_config() -> Config`; a variant of one is
`dataclasses.replace`. `validate` says what to write instead of whatever cannot work, before
anything is read or written. This module needs no jax, so that mistakes surface at once.
"""

import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from olmoe_jax.config.conflicts import conflicts
from olmoe_jax.config.evaluation import GenerateOptions
from olmoe_jax.config.schema import (
    LORA_TARGETS,
    POSITIVE,
    SHARE,
    SHARE_BELOW_ONE,
    UINT32,
    Field,
    Rule,
    at_least,
    nearest,
    not_empty,
    option,
    read_schema,
    show,
)
from olmoe_jax.errors import UserError


@dataclass(frozen=True)
class ModelOptions:
    """The network and the weights that it starts from."""

    path: str = option(
        "allenai/OLMoE-1B-7B-0125",
        "hub id or directory of the base model: a Hugging Face checkpoint or what convert.from_hf "
        "wrote; with init=random only the default of data.tokenizer_path",
        not_empty("allenai/OLMoE-1B-7B-0125"),
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "where the weights come from: model.path, or random numbers (for tests)"
    )
    config_path: str | None = option(
        None,
        "config.json of the network, or a directory that holds one; only with init=random, "
        "and required there",
        not_empty(),
    )
    compute_dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "type of activations and matmuls"
    )
    base_quantization: Literal["nf4", "int8"] | None = option(
        None,
        "LoRA only: how the frozen matrices of attention and experts are stored (QLoRA), 4 or 8 "
        "bits a weight and a scale for each block of 64; default: in compute_dtype",
    )
    remat: Literal["full", "selective", "none"] = option(
        "full",
        "what the backward recomputes: full: every layer (least memory); selective: what is cheap, "
        "the outputs of matmuls and attention are kept; none: nothing",
    )
    grouped_matmul: Literal["blocked", "ragged_dot", "tokamax", "pallas_triton"] | None = option(
        None,
        "how the experts' matmuls are computed; default: blocked on CPUs, tokamax on NVIDIA GPUs, "
        "ragged_dot on TPUs",
    )
    attention: Literal["chunked", "pallas_triton", "cudnn", "splash"] | None = option(
        None,
        "how attention is computed; default: chunked on CPUs, pallas_triton on NVIDIA GPUs, splash "
        "on TPUs",
    )


@dataclass(frozen=True)
class DataOptions:
    """The examples to train and evaluate on, and how they become rows of tokens."""

    train_path: str = option(
        "",
        "training examples: a local .jsonl, .json or .parquet file, or OWNER/NAME:FILE on the hub; "
        "must be set",
        not_empty("RoxanneWsyw/gsm:train.jsonl"),
    )
    eval_path: str | None = option(
        None, "evaluation examples, as train_path; default: held out from train", not_empty()
    )
    eval_fraction: float = option(
        0.1,
        "share of the training examples held out for evaluation when eval_path is none; "
        "0: no evaluation",
        SHARE_BELOW_ONE,
    )
    tokenizer_path: str | None = option(
        None, "hub id or directory of the tokenizer; default: model.path", not_empty()
    )
    max_seq_length: int = option(
        4096, "tokens per row; a longer example loses its end", at_least(2)
    )
    pack: bool = option(
        True, "put several examples into one row; changes the speed, not the mathematics"
    )
    cache_dir: str | None = option(
        None,
        "directory of tokenised data sets; default: $OLMOE_JAX_CACHE or ~/.cache/olmoe_jax",
        not_empty(),
    )


@dataclass(frozen=True)
class MethodOptions:
    """How the router learns."""

    name: Literal["frozen", "conventional", "densemixer", "esft_gate", "esft_token"] = option(
        "densemixer",
        "router gradient: none, through the selected experts, or through all experts; esft_*: "
        "train only the experts that score high on the task, by gate or by token score",
    )
    router_gradient_experts: int | None = option(
        None,
        "densemixer only: the m most probable experts get their exact router gradient term; "
        "default: all experts, which is exact DenseMixer",
        at_least(1),
    )
    router_gradient_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = option(
        None,
        "densemixer only: type of the extra matmuls' factors (their sums are float32); "
        "float8_e4m3fn is fast on H100s and later; default: model.compute_dtype, which is exact",
    )
    lora_rank: int | None = option(
        None,
        "train adapters of this rank instead of the weights (and, unless name=frozen, the router "
        "itself); default: full fine-tuning",
        at_least(1),
    )
    lora_alpha: float = option(16.0, "the adapters' product counts alpha / rank times", POSITIVE)
    lora_dropout: float = option(
        0.1, "share of the adapters' inputs set to zero in training", SHARE_BELOW_ONE
    )
    lora_targets: str = option(
        "q,k,v,o,gate,up,down",
        "matrices with an adapter: some of q, k, v, o (attention), gate, up, down (every expert)",
        LORA_TARGETS,
    )
    lora_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    adapter_path: str | None = option(
        None,
        "PEFT adapter directory to start from (and a router.safetensors in it), of this config's "
        "rank, alpha and targets; default: new adapters",
        not_empty(),
    )
    experts_path: str | None = option(
        None,
        "esft_*: expert config JSON; default: score the base on the training data and select, into "
        "OUTPUT_DIR/experts.json",
        not_empty(),
    )
    esft_top_p: float | None = option(
        None,
        "esft_*: select experts until they hold this share of a layer's score; default: 0.1 for "
        "esft_gate, 0.2 for esft_token (the ESFT paper's)",
        Rule("must be above 0 and at most 1", lambda value: 0 < value <= 1, "0.2"),
    )
    esft_score_tokens: int = option(
        300_000, "esft_*: tokens of the training data to score the experts on", at_least(1)
    )
    esft_train_head: bool = option(
        True, "esft_*: lm_head trains too (with tied weights, the embedding), as in the reference"
    )
    esft_densemixer: bool = option(False, "esft_*: DenseMixer's router gradient besides")
    router_aux_loss_coefficient: float = option(
        0.0, "weight of the load-balancing loss; 0: none", at_least(0.0)
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
    weight_decay: float = option(0.0, "decoupled weight decay", at_least(0.0))
    beta1: float = option(0.9, "decay per step of the first moment", SHARE_BELOW_ONE)
    beta2: float = option(0.999, "decay per step of the second moment", SHARE_BELOW_ONE)
    epsilon: float = option(1e-8, "added to the root of the second moment", POSITIVE)
    max_grad_norm: float | None = option(
        1.0, "global norm to which gradients are clipped; none: they are not", POSITIVE
    )
    moments_dtype: Literal["float32", "bfloat16", "int8"] = option(
        "float32",
        "how both moments are stored; bfloat16 and int8 (with a scale for each block of 256) are "
        "rounded stochastically",
    )
    gradients_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "how a step's gradients are added up, and how the model reads its weights (not router, "
        "norms and embedding: always float32); bfloat16: only with model.compute_dtype=bfloat16",
    )
    master_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "how updates of the weights are added up; bfloat16: rounded stochastically, only with "
        "gradients_dtype=bfloat16",
    )


@dataclass(frozen=True)
class TrainOptions:
    """The run: its length, its output and what it keeps."""

    output_dir: str = option(
        "",
        "directory of checkpoints, metrics and exports; must be set (configs/ use "
        "runs/METHOD_DATASET)",
        not_empty("runs/densemixer_gsm"),
    )
    batch_size: int = option(256, "examples per step", at_least(1))
    epochs: int = option(4, "passes over the training examples", at_least(1))
    max_steps: int | None = option(
        None, "stop after this many steps; default: when the epochs are over", at_least(1)
    )
    seed: int = option(0, "seed of shuffling, held-out split and random weights", UINT32)
    loss_normalization: Literal["tokens", "microbatch"] = option(
        "tokens",
        "mean over the step's tokens, or the reference's mean of the micro-batches' means",
    )
    microbatch_examples: int = option(
        4,
        "examples per micro-batch of the reference; read only with loss_normalization=microbatch",
        at_least(1),
    )
    rows_per_device: int = option(
        1, "rows of data.max_seq_length tokens that a device processes at once", at_least(1)
    )
    eval_every: int | None = option(
        None, "steps between evaluations besides the one at each epoch's end", at_least(1)
    )
    checkpoint_every: int = option(100, "steps between checkpoints", at_least(1))
    keep_checkpoints: int = option(
        2, "latest checkpoints to keep; the best is kept besides", at_least(1)
    )
    best_metric: Literal[
        "eval_loss", "exact_match", "loss", "grad_norm", "router_entropy", "unused_experts"
    ] = option(
        "eval_loss",
        "which number names the best checkpoint; looked at after every evaluation (exact_match: "
        "generate.every; loss, grad_norm, router_entropy, unused_experts: of the step before)",
    )
    best_metric_mode: Literal["min", "max"] | None = option(
        None,
        "whether low or high is best; default: max for exact_match and router_entropy, else min",
    )
    max_nonfinite_steps: int = option(
        5,
        "stop after this many updates in a row were skipped for a non-finite loss or gradient",
        at_least(1),
    )
    profile_steps: int = option(
        0,
        "steps to trace with jax.profiler after the first two, which compile, into "
        "OUTPUT_DIR/tensorboard",
        at_least(0),
    )
    wandb_project: str | None = option(
        None,
        "Weights & Biases project that gets what TensorBoard gets (pip install wandb; the key is "
        "read from $WANDB_API_KEY); default: none",
        not_empty("olmoe"),
    )
    resume: Literal["auto", "restart"] = option(
        "auto",
        "auto: continue the run in output_dir, which must have this config; restart: start afresh",
    )
    export_hf: bool = option(
        True, "write the final model as a Hugging Face checkpoint to OUTPUT_DIR/hf"
    )
    export_best: bool = option(
        False, "write the best model by train.best_metric to OUTPUT_DIR/hf_best"
    )
    export_dtype: Literal["bfloat16", "float32"] | None = option(
        None,
        "type of the exported checkpoint's weights (adapters are float32); default: the base's",
    )


@dataclass(frozen=True)
class MeshOptions:
    """How the devices are arranged; data x fsdp x expert is their number."""

    data: int = option(1, "groups of devices that each hold a full copy of the state", at_least(1))
    fsdp: int = option(
        -1,
        "devices over which parameters and optimizer state are sharded; -1: all the remaining",
        Rule("must be positive, or -1", lambda value: value == -1 or value > 0, "-1"),
    )
    expert: int = option(
        1,
        "devices over which the experts (and, as over fsdp, all that is sharded) are split; must "
        "divide their number",
        at_least(1),
    )
    expert_exchange: Literal["tokens", "weights"] = option(
        "tokens",
        "what devices send each other over expert in every layer: the tokens to all experts' "
        "devices and the outputs back, or the experts' weights to all tokens' devices",
    )


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


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS: dict[str, Field] = read_schema(SECTIONS)


def get_field(path: str) -> Field:
    """The schema's entry for a dotted path, or an error that names the nearest one."""
    if path in FIELDS:
        return FIELDS[path]
    if path in SECTIONS:
        inside = ", ".join(name for name in FIELDS if name.startswith(f"{path}."))
        raise UserError(f"{path} is a section, not a field: set one of {inside}")
    raise UserError(f"unknown config field {path}: did you mean {nearest(path, FIELDS)}?")


def parse_override(path: str, text: str) -> Any:
    """The typed value of the field `path` that `text` spells."""
    return get_field(path).parse(text)


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """A validated `config` in which the fields {dotted path: text} are replaced."""
    values = {path: parse_override(path, text) for path, text in overrides.items()}
    return validate(_build({**_flatten(to_dict(check_types(config))), **values}))


def validate(config: Config) -> Config:
    """`config` with ints in float fields converted; a `UserError` on anything that cannot work."""
    config = check_types(config)
    for path, value in _flatten(to_dict(config)).items():
        FIELDS[path].check_range(value)
    for conflict in conflicts(config):
        raise UserError(conflict)
    return config


def check_types(config: Config) -> Config:
    """`config` with every value checked against its annotation; ranges are `validate`'s."""
    for name, cls in SECTIONS.items():
        if not isinstance(getattr(config, name), cls):
            raise UserError(f"{name}={getattr(config, name)!r}: expected a {cls.__name__}")
    return from_dict(to_dict(config))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """{section: {field: value}}, ready for JSON."""
    return {section: dict(vars(getattr(config, section))) for section in SECTIONS}


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `to_dict`; what is absent has its default. Checks names and types."""
    for section, inside in values.items():
        if section not in SECTIONS:
            get_field(section)
        if not isinstance(inside, Mapping):
            raise UserError(f"{section}={inside!r}: expected a section with fields")
    return _build({path: get_field(path).check_type(v) for path, v in _flatten(values).items()})


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()
) -> str | None:
    """In words, the first field outside `ignore` that differs between two `to_dict` results.

    A field that `old` lacks had its default: the run was started before the field existed.
    """
    had = {path: entry.default for path, entry in FIELDS.items()} | _flatten(old)
    says = _flatten(new)
    for path, value in had.items():
        if path not in ignore and says.get(path) != value:
            return f"{path}: the run has {show(value)}, this command says {show(says.get(path))}"
    return None


def _flatten(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{name}": v for section, inside in values.items() for name, v in inside.items()
    }


def _build(values: Mapping[str, Any]) -> Config:
    """The Config of {dotted path: value}."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path, value in values.items():
        section, name = path.split(".")
        sections[section][name] = value
    return Config(**{name: cls(**sections[name]) for name, cls in SECTIONS.items()})
