"""What each fine-tuning method trains."""

from olmoe_jax.model.parameters import Parameters

ROUTER = "layers.moe.router"


def trains(method: str, name: str) -> bool:
    """Whether the method updates this parameter."""
    return not (method == "frozen" and name == ROUTER)


def split_trained(method: str, parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Splits parameters into those that the method trains and those that stay as they are."""
    trained = {name: value for name, value in parameters.items() if trains(method, name)}
    return trained, {name: value for name, value in parameters.items() if name not in trained}
