"""Two methods of the comparison's ablation, in which the router alone trains."""

from olmoe_jax.config.methods import MethodDeclaration, register
from olmoe_jax.methods import Method
from olmoe_jax.model.parameters import ROUTER


class RouterOnly(Method):
    """The router trains, through each token's top-k experts; every other weight keeps its value."""

    def trains(self, name: str) -> bool:
        return name == ROUTER


class DenseRouterOnly(RouterOnly):
    """The router trains, through all experts; every other weight keeps its value."""

    dense_router_gradient = True


ROUTER_ONLY, DENSE_ROUTER_ONLY = "router_only", "dense_router_only"

for _name, _class in ((ROUTER_ONLY, RouterOnly), (DENSE_ROUTER_ONLY, DenseRouterOnly)):
    register(
        MethodDeclaration(
            name=_name, help="the router", implementation=f"{__name__}:{_class.__name__}"
        )
    )
