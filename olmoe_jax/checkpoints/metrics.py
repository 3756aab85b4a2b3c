"""The lines of a run's metrics.jsonl, as their readers declare them."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated

import pydantic

from olmoe_jax.files import STRICT, read_json_lines

METRICS = "metrics.jsonl"
"""In a run's directory: a JSON line for each step and each evaluation."""

_Number = Annotated[
    Annotated[float, pydantic.Field(ge=-1e39, le=1e39)] | None,
    # NaN and infinities are no JSON, but Python writes them.
    pydantic.BeforeValidator(lambda x: None if x != x or x in (math.inf, -math.inf) else x),
]
"""A number in the range of float32, None if it is not finite."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """The numbers of one line of metrics.jsonl, which a step or an evaluation wrote."""

    step: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    loss: _Number = None
    eval_loss: _Number = None
    exact_match: _Number = None
    seconds: _Number = None


def read_metrics(run: Path) -> list[Metrics]:
    """Returns the lines of a run's metrics, without a last line that a crash cut off.

    Raises:
      UserError: the file is damaged.
    """
    file = run / METRICS
    return list(read_json_lines(Metrics, file, torn=True)) if os.path.lexists(file) else []
