"""Combinations of fields that cannot work, or in which a run would silently ignore a field."""

from collections.abc import Iterator

from olmoe_jax.config.fields import show
from olmoe_jax.config.methods import METHODS, readers
from olmoe_jax.config.options import FIELDS, Config
from olmoe_jax.sources import parse, reads

_SCORING = ("esft_top_p", "esft_score_tokens")
_LORA_DETAILS = ("lora_alpha", "lora_dropout", "lora_targets", "adapter_path")


def conflicts(config: Config) -> Iterator[str]:
    """Yields one line for each conflict, which says what to write instead."""
    sections = (_model, _data, _quantization, _optimizer, _router_gradient, _method)
    for conflicts_of in (*sections, _evaluation, _generate):
        yield from conflicts_of(config)


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.init == "random" and model.config_path is None:
        yield "model.init=random: needs the network's shape; set model.config_path to a config.json"
    if model.init == "pretrained" and model.config_path is not None:
        yield (
            f"model.config_path={model.config_path}: only read with model.init=random; write none: "
            "the pretrained model.path has its own config.json"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    train, evaluation = (parse(path) if path else () for path in (data.train_path, data.eval_path))
    if any(source.weight != 1 for source in evaluation):
        yield f"data.eval_path={data.eval_path}: only sources of data.train_path have a weight"
    if any(source.name for source in train):
        yield (
            f"data.train_path={data.train_path}: only sources of data.eval_path have a name, which "
            "is that of a set to evaluate; leave it out"
        )
    for name, sources in (("hub_config", [*train, *evaluation]), ("split", train)):
        value, setting = getattr(data, name), name.removeprefix("hub_")
        if value and not reads(sources, setting):
            yield (
                f"data.{name}={value}: only read of a data set OWNER/NAME on the hub that has no "
                f"{setting}= of its own; write none"
            )


def _quantization(config: Config) -> Iterator[str]:
    model = config.model
    if model.base_quantization is None:
        return
    asked = f"model.base_quantization={model.base_quantization}"
    if config.method.lora_rank is None:
        yield (
            f"{asked}: quantized weights cannot train; write none, or train adapters: "
            f"method.lora_rank=64, with method.name={_either(readers('lora_rank'))}"
        )
    if model.init == "random":
        yield f"{asked}: only for a pretrained base; write none, or model.init=pretrained"
    if model.remat == "none":
        yield (
            f"{asked}: model.remat=none would keep every layer's weights in "
            f"{model.compute_dtype} for the backward; write model.remat=full or selective"
        )


def _optimizer(config: Config) -> Iterator[str]:
    model, optimizer = config.model, config.optimizer
    if optimizer.gradients_dtype == "bfloat16" and model.compute_dtype != "bfloat16":
        yield (
            "optimizer.gradients_dtype=bfloat16: the model would read its weights in bfloat16; "
            f"write float32, or model.compute_dtype=bfloat16 instead of {model.compute_dtype}"
        )
    if optimizer.master_dtype == "bfloat16" and optimizer.gradients_dtype != "bfloat16":
        yield (
            "optimizer.master_dtype=bfloat16: gradients add up in the weights' dtype; write "
            "float32, or set optimizer.gradients_dtype=bfloat16 too"
        )


def _router_gradient(config: Config) -> Iterator[str]:
    model, method = config.model, config.method
    if method.router_gradient_dtype == model.compute_dtype:
        yield (
            f"method.router_gradient_dtype={model.compute_dtype}: is model.compute_dtype, the "
            "default; write none"
        )
    if method.router_gradient_dtype == "float8_e4m3fn" and method.router_gradient_experts:
        yield (
            f"method.router_gradient_experts={method.router_gradient_experts}: no grouped matmul "
            "computes in float8_e4m3fn; write none, or method.router_gradient_dtype=none"
        )


def _method(config: Config) -> Iterator[str]:
    """Yields the fields that the method, or what else is set, leaves unread."""
    method, row = config.method, METHODS[config.method.name]
    for name, value in vars(method).items():
        default, names = FIELDS[f"method.{name}"].default, readers(name)
        if value == default:
            continue
        given = f"method.{name}={show(value)}"
        if names and name not in row.own_fields:
            yield (
                f"{given}: only for method.name={_either(names)}, not {method.name}; "
                f"write {show(default)}"
            )
        elif (switch := row.switches.get(name)) and not getattr(method, switch):
            yield (
                f"{given}: with {method.name}, only read with method.{switch}=true; set that, or "
                f"write {show(default)}"
            )
        elif name in _SCORING and method.experts_path is not None:
            yield (
                f"{given}: not read with method.experts_path, which says what trains; write "
                f"{show(default)}"
            )
        elif name in _LORA_DETAILS and method.lora_rank is None:
            yield f"{given}: only read with method.lora_rank; set that, or write {show(default)}"


def _either(names: list[str]) -> str:
    """Returns "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _evaluation(config: Config) -> Iterator[str]:
    data, train, generate = config.data, config.train, config.generate
    if data.eval_path is not None or data.eval_fraction > 0:
        return
    instead = "or set data.eval_path or data.eval_fraction"
    if train.eval_every is not None:
        yield (
            f"train.eval_every={train.eval_every}: there is nothing to evaluate; write none, "
            f"{instead}"
        )
    if train.export_best:
        yield f"train.export_best=true: evaluations find the best model; write false, {instead}"
    if generate.every is not None:
        yield f"generate.every={generate.every}: there is nothing to decode; write none, {instead}"


def _generate(config: Config) -> Iterator[str]:
    if config.generate.every is not None:
        return
    if config.train.best_metric == "exact_match":
        yield (
            "train.best_metric=exact_match: the run decodes nothing while it trains; set "
            "generate.every, or write eval_loss"
        )
    for name, default in vars(type(config.generate)()).items():
        if (value := getattr(config.generate, name)) != default:
            yield (
                f"generate.{name}={show(value)}: only read with generate.every; set that, or "
                f"write {show(default)}"
            )
