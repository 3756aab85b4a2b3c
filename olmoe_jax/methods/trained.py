"""What each fine-tuning method trains."""

from collections.abc import Callable

from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.config import MethodOptions
from olmoe_jax.model.config import ModelConfig, RouterMethod
from olmoe_jax.model.parameters import ROUTER, Parameters, count_parameters


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return ".lora." in name


def trained_names(*, lora: bool, router: bool) -> Callable[[str], bool]:
    """Tells of a parameter's name whether it trains, for full fine-tuning and LoRA.

    Args:
      lora: only the adapters train (and the router, at full rank), instead of all weights.
      router: whether the router trains.
    """

    def trains(name: str) -> bool:
        if name == ROUTER:
            return router
        return is_adapter(name) or not lora

    return trains


def esft_names(*, head: str | None, non_expert_modules: bool) -> Callable[[str], bool]:
    """As `trained_names`, for ESFT: the selected experts, the head, perhaps all but the experts.

    `head`: the name of the output projection where it trains (the embedding, when they are tied).
    """

    def trains(name: str) -> bool:
        if name.startswith("tuned.") or name == head:
            return True
        return non_expert_modules and ".experts." not in name

    return trains


def method_trains(
    options: MethodOptions, config: ModelConfig, experts: ExpertConfig | None
) -> Callable[[str], bool]:
    """As `trained_names`, for a run's method."""
    if experts is None:
        return trained_names(lora=options.lora_rank is not None, router=options.name != "frozen")
    head = "embed" if config.tie_word_embeddings else "lm_head"
    return esft_names(
        head=head if options.esft_train_head else None,
        non_expert_modules=experts.non_expert_modules,
    )


def router_method(options: MethodOptions) -> RouterMethod:
    """How gradient reaches the router; with ESFT it matters for what lies below."""
    if options.name.startswith("esft_"):
        return "densemixer" if options.esft_densemixer else "conventional"
    return options.name


def split_trained(
    trains: Callable[[str], bool], parameters: Parameters
) -> tuple[Parameters, Parameters]:
    """Splits parameters into those that train and those that stay as they are."""
    trained = {name: value for name, value in parameters.items() if trains(name)}
    return trained, {name: value for name, value in parameters.items() if name not in trained}


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for the table at the start of a run."""
    if is_adapter(name):
        return "expert adapters" if ".experts." in name else "attention adapters"
    if name.startswith("tuned."):
        return "selected experts"
    for part, group in (
        (".experts.", "experts"),
        (".router", "router"),
        ("norm", "norms"),
        (".attention.", "attention"),
    ):
        if part in name:
            return group
    return {"embed": "embedding", "lm_head": "head"}[name]


def parameter_table(trained: Parameters, frozen: Parameters) -> list[str]:
    """Returns lines that count the trained and frozen parameters of each group."""
    counts: dict[str, list[int]] = {}
    for name, count in count_parameters(trained | frozen).items():
        for group in (group_of(name), "all"):
            counts.setdefault(group, [0, 0])[name not in trained] += count
    counts["all"] = counts.pop("all")
    lines = [f"{'parameters':20}{'trained':>16}{'frozen':>16}"]
    return lines + [f"  {group:18}{a:16,}{b:16,}" for group, (a, b) in counts.items()]
