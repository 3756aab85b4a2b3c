"""Full fine-tuning: three ways for the router to learn."""

from olmoe_jax.methods.method import Method


class Frozen(Method):
    """The router keeps its weight; every other weight trains."""

    router_trains = False


class Conventional(Method):
    """The router learns through each token's top-k experts: plain differentiation."""


class DenseMixer(Method):
    """The router learns through all experts (see `olmoe_jax.ops.router_gradient`)."""

    router_gradient = "all"
