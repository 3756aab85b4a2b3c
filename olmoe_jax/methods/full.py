"""Full fine-tuning with another router than `conventional`, which is `Method` itself."""

from olmoe_jax.methods.method import Method
from olmoe_jax.model.parameters import ROUTER


class Frozen(Method):
    """The router keeps its weight; every other weight trains."""

    def trains(self, name: str) -> bool:
        return name != ROUTER


class DenseMixer(Method):
    """The router learns through all experts (see `olmoe_jax.ops.router_gradient`)."""

    dense_router_gradient = True
