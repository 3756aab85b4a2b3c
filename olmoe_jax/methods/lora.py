"""LoRA: adapters train beside frozen weights; the router learns as in full fine-tuning."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from olmoe_jax.checkpoints.export import export_adapter
from olmoe_jax.checkpoints.merging import with_router
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.peft import read_adapter
from olmoe_jax.errors import UserError
from olmoe_jax.methods.method import Base, Method
from olmoe_jax.model.config import LoraSettings, ModelSettings
from olmoe_jax.model.lora import is_adapter
from olmoe_jax.model.parameters import ROUTER


class Lora(Method):
    """Another method with adapters: they train, and the router at full rank if it trains there.

    `full` is the other method, which says how the router learns; `router_trains` overrides whether
    it trains.
    """

    export_name = "adapter"

    def __init__(self, full: Method, lora: LoraSettings, router_trains: bool | None = None):
        super().__init__(full.options, full.config)
        self.lora = lora
        self.dense_router_gradient = full.dense_router_gradient
        self.router_trains = full.trains(ROUTER) if router_trains is None else router_trains

    def model_settings(self, settings: ModelSettings) -> ModelSettings:
        return dataclasses.replace(super().model_settings(settings), lora=self.lora)

    def trains(self, name: str) -> bool:
        return is_adapter(name) or (name == ROUTER and self.router_trains)

    def check(self) -> None:
        if self.options.adapter_path:
            self._given_adapter(self.options.adapter_path)

    def added_parameters(self, base: Base) -> Mapping[str, jax.Array | np.ndarray]:
        path = self.options.adapter_path
        if not path:
            return base.draw(is_adapter)
        return with_router(*self._given_adapter(path), base.source)[1]

    def describe(self) -> str:
        lora = self.lora
        return (
            f"{super().describe()} with LoRA: rank {lora.rank}, alpha {lora.alpha:g}, "
            f"dropout {lora.dropout:g}"
        )

    def export(self, run: RunCheckpoint, target: Path) -> None:
        export_adapter(run, target)

    def _given_adapter(self, path: str) -> tuple[LoraSettings, dict[str, np.ndarray]]:
        """Reads the adapter that the run starts from, and its router if it has one."""
        wanted = self.lora
        lora, parameters = read_adapter(path, self.config)
        targets = [target for target in lora.targets if target != "router"]
        same_size = (set(targets), lora.rank) == (set(wanted.targets), wanted.rank)
        if not same_size or not math.isclose(lora.scale, wanted.scale):
            raise UserError(
                f"method.adapter_path={path}: has rank {lora.rank}, alpha "
                f"{lora.scale * lora.rank:g}, targets {','.join(targets)}; set "
                "method.lora_rank, lora_alpha and lora_targets to these"
            )
        if (ROUTER in parameters or "router" in lora.targets) and not self.router_trains:
            raise UserError(
                f"method.adapter_path={path}: holds a trained router, but "
                f"method.name={self.options.name} keeps the base's; write a method whose router "
                "trains, or start from convert.merge_lora's output"
            )
        return lora, parameters
