"""The configuration of a run: its fields, reading them from files and flags, and what is refused.

This package needs no jax, so that a mistake shows at once.
"""

from olmoe_jax.config.options import (
    FIELDS,
    SECTIONS,
    Config,
    DataOptions,
    GenerateOptions,
    MeshOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
    apply_overrides,
    check_types,
    first_difference,
    from_dict,
    get_field,
    parse_override,
    to_dict,
    validate,
)

__all__ = [
    "FIELDS",
    "SECTIONS",
    "Config",
    "DataOptions",
    "GenerateOptions",
    "MeshOptions",
    "MethodOptions",
    "ModelOptions",
    "OptimizerOptions",
    "TrainOptions",
    "apply_overrides",
    "check_types",
    "first_difference",
    "from_dict",
    "get_field",
    "parse_override",
    "to_dict",
    "validate",
]
