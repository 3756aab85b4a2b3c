"""Combinations of fields that cannot work, or in which a run would silently ignore a field."""

from collections.abc import Iterator

from olmoe_jax.config.fields import show
from olmoe_jax.config.options import Config

_ESFT_SCORING = ("esft_top_p", "esft_score_tokens")
_ESFT_ONLY = (*_ESFT_SCORING, "experts_path", "esft_train_head", "esft_densemixer")
_LORA_DETAILS = ("lora_alpha", "lora_dropout", "lora_targets")


def conflicts(config: Config) -> Iterator[str]:
    """Yields one line for each conflict, which says what to write instead."""
    sections = (_model, _quantization, _optimizer, _router_gradient, _method)
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


def _quantization(config: Config) -> Iterator[str]:
    model = config.model
    if model.base_quantization is None:
        return
    asked = f"model.base_quantization={model.base_quantization}"
    if config.method.lora_rank is None:
        yield (
            f"{asked}: quantized weights cannot train; write none, or train adapters: "
            "method.lora_rank=64, with method.name=frozen, conventional or densemixer"
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
    esft = method.name.startswith("esft_")
    densemixer = method.name == "densemixer" or (esft and method.esft_densemixer)
    for name in ("router_gradient_experts", "router_gradient_dtype"):
        value = getattr(method, name)
        if value is not None and not densemixer:
            yield (
                f"method.{name}={value}: only for method.name=densemixer, not {method.name}; "
                "write none"
            )
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
    method, defaults = config.method, type(config.method)()
    esft = method.name.startswith("esft_")
    if method.lora_rank is not None and esft:
        yield (
            f"method.lora_rank={method.lora_rank}: {method.name} trains whole experts; write none, "
            "or method.name=frozen, conventional or densemixer"
        )
    for name, value in vars(method).items():
        default = getattr(defaults, name)
        if value == default:
            continue
        if not esft and name in _ESFT_ONLY:
            yield (
                f"method.{name}={show(value)}: only for esft_gate and esft_token, "
                f"not {method.name}; write {show(default)}"
            )
        if method.experts_path is not None and name in _ESFT_SCORING:
            yield (
                f"method.{name}={show(value)}: not read with method.experts_path, which says "
                f"what trains; write {show(default)}"
            )
        if method.lora_rank is None and name in _LORA_DETAILS:
            yield (
                f"method.{name}={show(value)}: only read with method.lora_rank; set that, or "
                f"write {show(default)}"
            )
    if method.adapter_path is not None and method.lora_rank is None:
        yield (
            f"method.adapter_path={method.adapter_path}: only read with method.lora_rank; set "
            "that to the adapter's rank"
        )


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
