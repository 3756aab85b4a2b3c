"""The configuration of a run: its fields, its files and flags, and the errors about them.

This package imports no jax, so that a user reads about a mistake at once.
"""

from olmoe_jax.config.options import (
    FIELDS,
    Config,
    DataOptions,
    GenerateOptions,
    MeshOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
)
from olmoe_jax.config.values import (
    apply_overrides,
    first_difference,
    flatten,
    from_dict,
    to_dict,
    validate,
)

__all__ = [
    "FIELDS",
    "Config",
    "DataOptions",
    "GenerateOptions",
    "MeshOptions",
    "MethodOptions",
    "ModelOptions",
    "OptimizerOptions",
    "TrainOptions",
    "apply_overrides",
    "first_difference",
    "flatten",
    "from_dict",
    "to_dict",
    "validate",
]
