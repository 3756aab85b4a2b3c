"""A run's kernels on its device and at its sizes, before its first step: right, and fast."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from olmoe_jax.config import Config
from olmoe_jax.errors import UserError, first_line, shorten
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.ops.grouped_matmul import BACKENDS, check_backend
from olmoe_jax.ops.proof import (
    prove_attention,
    prove_grouped_matmul,
    time_grouped_matmul,
    tolerance,
)
from olmoe_jax.parallel import distributed
from olmoe_jax.training import run_directory
from olmoe_jax.training.base_model import BaseModel

MOST_ROWS = 32_768
"""Rows of a proof at most, so that plain XLA takes a second, too."""


def prove_kernels(config: ModelConfig, settings: ModelSettings, rows: int, length: int) -> str:
    """Compares the backends of a run with plain XLA: forward and every gradient.

    `rows` are those of a micro-batch on this device, `length` their positions. Returns a line with
    the largest error of each.

    Raises:
      UserError: a backend computes something else, or does not run. The line names it, the error
        and the field to set.
    """
    dtype = settings.compute_dtype
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    matmul, attend = str(settings.grouped_matmul), str(settings.attention)
    prove = functools.partial(prove_attention, attend, (1, length, *heads), dtype)
    sizes = _sizes(config, settings, rows * length)
    matmul_error, matmul_wrong = _grouped_matmul_error(matmul, sizes, dtype)
    attention_error, attention_wrong = _error(prove, dtype)
    for field, backend, plain, wrong in (
        ("model.grouped_matmul", matmul, "blocked", matmul_wrong),
        ("model.attention", attend, "chunked", attention_wrong),
    ):
        if wrong:
            instead = f"write {field}={plain}" if backend != plain else "run olmoe_jax.doctor"
            raise UserError(f"{field}={backend}: {wrong}; {instead}")
    return (
        f"kernels proven against plain XLA: largest error grouped_matmul {matmul_error:.1e}, "
        f"attention {attention_error:.1e} (of {tolerance(dtype):.0e})"
    )


def with_proven_kernels(
    config: Config, model: BaseModel, row_length: int
) -> tuple[Config, BaseModel]:
    """Chooses the kernels of a run, and proves them on an accelerator before they are trusted.

    Raises:
      UserError: see `prove_kernels`.
    """
    config, model = with_fastest_grouped_matmul(config, model, row_length)
    if jax.default_backend() != "cpu":
        rows = config.train.rows_per_device
        proven = prove_kernels(model.config, model.settings, rows, row_length)
        if distributed.is_writer():
            print(proven, flush=True)
    return config, model


def with_fastest_grouped_matmul(
    config: Config, model: BaseModel, row_length: int
) -> tuple[Config, BaseModel]:
    """Replaces model.grouped_matmul=auto by a backend, the same one on every process.

    A continued run keeps its backend, so that its numbers stay the same to the last bit. Process 0
    chooses for a run that begins: on a GPU the fastest backend that is right, elsewhere the
    platform's default.
    """
    if config.model.grouped_matmul != "auto":
        return config, model
    chosen: Any = model.compute.grouped_matmul  # the platform's default
    if distributed.is_writer():
        if kept := _kept_grouped_matmul(config):
            chosen = kept
            print(f"model.grouped_matmul=auto: keeps the run's {kept}", flush=True)
        elif jax.default_backend() == "gpu":
            tokens = config.train.rows_per_device * row_length
            chosen = fastest_grouped_matmul(model.config, model.settings, tokens, _candidates())
    chosen = distributed.from_writer("grouped matmul", chosen)
    options = dataclasses.replace(config.model, grouped_matmul=chosen)
    compute = dataclasses.replace(model.compute, grouped_matmul=chosen)
    return (
        dataclasses.replace(config, model=options),
        dataclasses.replace(model, compute=compute),
    )


def fastest_grouped_matmul(
    config: ModelConfig, settings: ModelSettings, tokens: int, candidates: list[str]
) -> str:
    """Returns the candidate whose forward and gradients take the least time; prints all times.

    `tokens` are those of a micro-batch on this device, `candidates` names of backends.

    Raises:
      UserError: none of the candidates is right.
    """
    dtype, sizes = settings.compute_dtype, _sizes(config, settings, tokens)
    seconds = {}
    for backend in candidates:
        _, wrong = _grouped_matmul_error(backend, sizes, dtype)
        said = f"left out, {wrong}"
        if not wrong:
            seconds[backend] = sum(time_grouped_matmul(backend, size, dtype) for size in sizes)
            said = f"{1e3 * seconds[backend]:.2f} ms"
        print(f"model.grouped_matmul=auto: {backend}: {said}", flush=True)
    if not seconds:
        raise UserError("model.grouped_matmul=auto: no backend is right; run olmoe_jax.doctor")
    return min(seconds, key=lambda backend: seconds[backend])


def _kept_grouped_matmul(config: Config) -> str | None:
    """Returns the backend of the run that `config` continues, if it runs here."""
    stored = run_directory.stored_config(config)
    if stored is None:
        return None
    with contextlib.suppress(UserError):  # the run began on another platform
        return check_backend(stored["model"].get("grouped_matmul"), jax.default_backend())
    return None


def _candidates() -> list[str]:
    """Returns the backends that are made for this platform and installed."""
    found = []
    for backend in BACKENDS:
        with contextlib.suppress(UserError):
            found.append(check_backend(backend, jax.default_backend()))
    return found


def _sizes(
    config: ModelConfig, settings: ModelSettings, tokens: int
) -> list[tuple[int, int, int, int]]:
    """Returns rows, in, out and groups of each kind of matrix that the experts multiply with."""
    width, inner = config.hidden_size, config.intermediate_size
    matrices = [(width, inner), (inner, width)]
    if settings.lora:
        rank = settings.lora.rank
        matrices += [(width, rank), (inner, rank), (rank, width), (rank, inner)]
    rows = min(tokens * config.num_experts_per_token, MOST_ROWS)
    return [(rows, *matrix, config.num_experts) for matrix in matrices]


def _grouped_matmul_error(
    backend: str, sizes: list[tuple[int, int, int, int]], dtype: jax.typing.DTypeLike
) -> tuple[float, str | None]:
    return _error(lambda: max(prove_grouped_matmul(backend, size, dtype) for size in sizes), dtype)


def _error(prove: Callable[[], float], dtype: jax.typing.DTypeLike) -> tuple[float, str | None]:
    """Returns the error of a backend, and what is wrong with it; None: nothing."""
    limit = tolerance(dtype)
    try:
        error = prove()
    except Exception as failure:  # a compiler's, of any type
        return float("nan"), f"does not run here ({shorten(first_line(failure), 200)})"
    if error <= limit:
        return error, None
    # NaN too.
    return error, (
        f"wrong on this device, its error against plain XLA is {error:.1e} of at most {limit:.0e}"
    )
