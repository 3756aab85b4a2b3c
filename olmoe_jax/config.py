"""The configuration of a run: typed fields, each declared once with its default, meaning and range.

A config file is Python that defines `get_config() -> Config`; a variant of one is
`dataclasses.replace`. `validate` says what to write instead of whatever cannot work, before
anything is read or written. This module needs no jax, so that mistakes surface at once.
"""

import dataclasses
import difflib
import math
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from olmoe_jax.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, in words and as a test, with a value that does."""

    requirement: str
    test: Callable[[Any], bool]
    example: str


def at_least(minimum: float) -> Rule:
    return Rule(f"must be {minimum} or more", lambda value: value >= minimum, str(minimum))


def not_empty(example: str = "PATH") -> Rule:
    return Rule("must not be empty", bool, example)


POSITIVE = Rule("must be positive", lambda value: value > 0, "1")
SHARE = Rule("must be from 0 to 1", lambda value: 0 <= value <= 1, "0")
UINT32 = Rule("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32, "0")
SHARE_BELOW_ONE = Rule("must be 0 or more and below 1", lambda value: 0 <= value < 1, "0")


def option(default: Any, help: str, rule: Rule | None = None) -> Any:
    """A dataclass field with its description (unit and default rule) and range."""
    return field(default=default, metadata={"help": help, "rule": rule})


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
        "bfloat16", "type of activations and matmuls; master weights and moments are float32"
    )
    remat: Literal["full", "none"] = option(
        "full", "what the backward recomputes: every layer (least memory) or nothing (fastest)"
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

    name: Literal["frozen", "conventional", "densemixer"] = option(
        "densemixer",
        "router gradient: none, through the selected experts, or through all experts",
    )
    router_gradient_experts: int | None = option(
        None,
        "densemixer only: the m most probable experts get their exact router gradient term; "
        "default: all experts, which is exact DenseMixer",
        at_least(1),
    )
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
    max_grad_norm: float = option(1.0, "global norm to which gradients are clipped", POSITIVE)


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
        2, "latest checkpoints to keep; the best by eval loss is kept besides", at_least(1)
    )
    max_nonfinite_steps: int = option(
        5,
        "stop after this many updates in a row were skipped for a non-finite loss or gradient",
        at_least(1),
    )
    resume: Literal["auto", "restart"] = option(
        "auto",
        "auto: continue the run in output_dir, which must have this config; restart: start afresh",
    )
    export_hf: bool = option(
        True, "write the final model as a Hugging Face checkpoint to OUTPUT_DIR/hf"
    )
    export_best: bool = option(
        False, "write the model with the lowest eval loss to OUTPUT_DIR/hf_best"
    )
    export_dtype: Literal["bfloat16", "float32"] | None = option(
        None, "type of the exported weights; default: the base checkpoint's"
    )


@dataclass(frozen=True)
class MeshOptions:
    """How the devices are arranged; data x fsdp is their number."""

    data: int = option(1, "groups of devices that each hold a full copy of the state", at_least(1))
    fsdp: int = option(
        -1,
        "devices over which parameters and optimizer state are sharded; -1: all the remaining",
        Rule("must be positive, or -1", lambda value: value == -1 or value > 0, "-1"),
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


@dataclass(frozen=True)
class Field:
    """One entry of the schema that is read off the dataclasses above."""

    path: str
    kind: type  # bool, int, float or str
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    rule: Rule | None

    @property
    def type_name(self) -> str:
        name = f"one of {', '.join(self.choices)}" if self.choices else self.kind.__name__
        return f"{name} or none" if self.optional else name

    @property
    def example(self) -> str:
        """A valid value: the default, where there is one."""
        if self.rule and self.default in (None, ""):
            return f"{self.rule.example} or none" if self.optional else self.rule.example
        return show(self.default)

    def parse(self, text: str) -> Any:
        """The value that `text` means on a command line."""
        if self.optional and text.lower() == "none":
            return None
        value: Any = text
        if self.kind is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.kind is not str:
            try:
                value = self.kind(text)
            except ValueError:
                raise self._wrong_type(text) from None
        return self.check_type(value, shown=text)

    def check_type(self, value: Any, shown: str | None = None) -> Any:
        """`value`, if its type is the declared one; an int is good for a float."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise self._wrong_type(repr(value) if shown is None else shown)
        return value

    def check_range(self, value: Any) -> None:
        finite = not isinstance(value, float) or math.isfinite(value)
        if finite and (value is None or self.rule is None or self.rule.test(value)):
            return
        requirement = self.rule.requirement if finite and self.rule else "must be finite"
        raise UserError(f"{self.path}={show(value)}: {requirement}; write e.g. {self.example}")

    def _wrong_type(self, shown: str) -> UserError:
        instead = "" if self.choices else f"; write e.g. {self.example}"
        return UserError(f"{self.path}={shown}: expected {self.type_name}{instead}")


def _read_schema() -> dict[str, Field]:
    schema = {}
    for section, cls in SECTIONS.items():
        annotations = typing.get_type_hints(cls)
        for declared in dataclasses.fields(cls):
            path = f"{section}.{declared.name}"
            kind, choices, optional = _read_annotation(annotations[declared.name])
            schema[path] = Field(
                path, kind, choices, optional, declared.default, **declared.metadata
            )
    return schema


def _read_annotation(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """kind, choices, optional of `T`, `Literal[...]`, and either `| None`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner, _ = typing.get_args(annotation)
        kind, choices, _ = _read_annotation(inner)
        return kind, choices, True
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), False
    return annotation, (), False


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS: dict[str, Field] = _read_schema()


def show(value: Any) -> str:
    """`value` as it is written on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def nearest(given: str, candidates: Iterable[str]) -> str:
    """The candidate most like `given`, as a whole or in its part after the last dot."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(given, candidate)
        return max(whole, _ratio(given.rpartition(".")[2], candidate.rpartition(".")[2])), whole

    return max(candidates, key=likeness)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


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
    for conflict in _conflicts(config):
        raise UserError(conflict)
    return config


def _conflicts(config: Config) -> Iterator[str]:
    """Combinations of fields in which one would be missing or silently ignored."""
    model, data, method, train = config.model, config.data, config.method, config.train
    if model.init == "random" and model.config_path is None:
        yield "model.init=random: needs the network's shape; set model.config_path to a config.json"
    if model.init == "pretrained" and model.config_path is not None:
        yield (
            f"model.config_path={model.config_path}: only read with model.init=random; "
            "write none, since the pretrained model.path has its own config.json"
        )
    if method.router_gradient_experts is not None and method.name != "densemixer":
        yield (
            f"method.router_gradient_experts={method.router_gradient_experts}: only for "
            f"method.name=densemixer, not {method.name}; write none"
        )
    if data.eval_path is None and data.eval_fraction == 0:
        if train.eval_every is not None:
            yield (
                f"train.eval_every={train.eval_every}: there is nothing to evaluate on; write "
                "none, or set data.eval_path or data.eval_fraction"
            )
        if train.export_best:
            yield (
                "train.export_best=true: the best model is the one with the lowest eval loss; "
                "write false, or set data.eval_path or data.eval_fraction"
            )


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


def load_config(path: str | Path) -> Config:
    """The Config that the Python file `path` defines, with its types checked.

    Ranges are checked by `validate` or `apply_overrides`: what a file leaves open may still
    come from the command line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(_missing_file(path))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failure(path, error)) from error
    if not callable(get_config):
        raise UserError(f"{path}: define get_config() in it, a function that returns a Config")
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: get_config() returned a {type(config).__name__}; it must return a "
            "olmoe_jax.config.Config"
        )
    return check_types(config)


def _missing_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a directory: name one of the config files in it"
    if not path.parent.is_dir():
        return f"{path}: there is no directory {path.parent}"
    present = sorted(file.name for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(path.name, present, n=3, cutoff=0.3)
    hint = f"nearest there: {', '.join(close)}" if close else "no name there is like it"
    return f"{path}: no such file; {hint}"


def _failure(path: Path, error: Exception) -> str:
    """What went wrong in a config file, and on which of its lines."""
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (frames or [None])[-1]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    hint = f"; did you mean {nearest(unknown[1], FIELDS)}?" if unknown else ""
    where = f"{path}:{line}" if line else str(path)
    return f"{where}: {type(error).__name__}: {message}{hint}"
