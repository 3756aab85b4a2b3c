"""Merging a LoRA adapter into its base, weight by weight."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints.names import Weight
from olmoe_jax.checkpoints.peft import ROUTER_WEIGHT, adapted, parameter_names, read_adapter
from olmoe_jax.checkpoints.source import ChangedSource, Source
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import LoraSettings
from olmoe_jax.model.parameters import ROUTER


def merged(value: np.ndarray, a: np.ndarray, b: np.ndarray, settings: LoraSettings) -> np.ndarray:
    """Returns W + scale * A B in float32, for one matrix or a stack of experts' matrices."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return value.astype(np.float32) + np.float32(settings.scale) * (a @ b)


def with_router(
    settings: LoraSettings, parameters: Mapping[str, np.ndarray], base: Source | None
) -> tuple[LoraSettings, dict[str, np.ndarray]]:
    """Returns an adapter (see `read_adapter`) whose router's factors have become a router.

    Models have no adapter of the router: it is small, and trains whole. Its weight [L, D, E],
    float32, replaces the base's.

    Raises:
      UserError: the router has an adapter, and there is no base.
    """
    if "router" not in settings.targets:
        return settings, dict(parameters)
    if base is None:
        raise UserError("the adapter adapts a base's router; write model.init=pretrained")
    factors = parameter_names(ROUTER_WEIGHT)
    router = [
        merged(base.read(ROUTER_WEIGHT, layer), a, b, settings)
        for layer, (a, b) in enumerate(zip(*(parameters[name] for name in factors), strict=True))
    ]
    rest = {name: value for name, value in parameters.items() if name not in factors}
    targets = tuple(target for target in settings.targets if target != "router")
    return dataclasses.replace(settings, targets=targets), rest | {ROUTER: np.stack(router)}


class MergedSource(ChangedSource):
    """The weights of a base with an adapter merged into it: W + scale * A B in float32.

    Args:
      base: the weights that the adapter was trained on.
      adapter: the adapter's directory. A router that trained beside the adapter replaces the
        base's.
      dtype: the base is rounded to this dtype first, as PEFT does when it merges into a base that
        was loaded in it; None leaves the base as it is stored.
    """

    def __init__(self, base: Source, adapter: Path, dtype: np.dtype | None = None):
        super().__init__(base)
        self._settings, self._adapter = read_adapter(adapter, base.config)
        self._dtype = dtype

    def read(self, weight: Weight, layer: int | None, experts: slice = slice(None)) -> np.ndarray:
        if weight.name in self._adapter:  # the router, trained at full rank
            return self._adapter[weight.name][layer]
        value = self.base.read(weight, layer, experts)
        if weight not in adapted(self._settings):
            return value
        a, b = (self._adapter[name][layer] for name in parameter_names(weight))
        if weight.per_expert:
            a, b = a[experts], b[experts]
        if self._dtype is not None:
            value = value.astype(self._dtype)
        return merged(value, a, b, self._settings)
