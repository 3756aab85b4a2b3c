"""A run's kernels against plain XLA, on its device and at its sizes, before its first step."""

import functools
from collections.abc import Callable

from olmoe_jax.errors import UserError, first_line, shorten
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.ops.proof import prove_attention, prove_grouped_matmul, tolerance

MOST_ROWS = 32_768
"""Rows of a proof at most, so that plain XLA takes a second, too."""


def prove_kernels(config: ModelConfig, settings: ModelSettings, rows: int, length: int) -> str:
    """Compares the backends of a run with plain XLA: forward and every gradient.

    Args:
      config: the architecture.
      settings: how the model computes, its adapters included.
      rows: rows of a micro-batch on this device.
      length: positions of a row.

    Returns:
      A line with the largest error of each.

    Raises:
      UserError: a backend computes something else, or does not run. The line names it, the error
        and the field to set.
    """
    dtype, sizes = settings.compute_dtype, (config.hidden_size, config.intermediate_size)
    count = min(rows * length * config.num_experts_per_token, MOST_ROWS)
    matrices = [sizes, sizes[::-1]]
    if settings.lora:
        matrices += [(size, settings.lora.rank) for size in sizes]
        matrices += [(settings.lora.rank, size) for size in sizes]
    matmul, attend = str(settings.grouped_matmul), str(settings.attention)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    limit = tolerance(dtype)
    grouped = functools.partial(_checked, f"model.grouped_matmul={matmul}", "blocked", limit)
    errors = {
        "grouped_matmul": max(
            grouped(
                functools.partial(
                    prove_grouped_matmul, matmul, (count, *matrix, config.num_experts), dtype
                )
            )
            for matrix in matrices
        ),
        "attention": _checked(
            f"model.attention={attend}",
            "chunked",
            limit,
            functools.partial(prove_attention, attend, (1, length, *heads), dtype),
        ),
    }
    found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"kernels proven against plain XLA: largest error {found} (of {limit:.0e})"


def _checked(backend: str, other: str, limit: float, prove: Callable[[], float]) -> float:
    """Returns the error of a backend that is right."""
    field = backend.partition("=")[0]
    try:
        error = prove()
    except Exception as failure:  # a compiler's, of any type
        said = shorten(first_line(failure), 200)
        raise UserError(
            f"{backend}: does not run here ({said}); write {field}={other}"
        ) from failure
    if not error <= limit:  # NaN too
        raise UserError(
            f"{backend}: wrong on this device, its error against plain XLA is {error:.1e} of at "
            f"most {limit:.0e}; write {field}={other}"
        )
    return error
