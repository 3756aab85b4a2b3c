"""Configuration of what a run evaluates while it trains, and by which number it names the best."""

from dataclasses import dataclass
from typing import Literal

from olmoe_jax.config.schema import at_least, option

MORE_IS_BETTER = ("exact_match", "router_entropy")


def best_mode(metric: str, mode: Literal["min", "max"] | None) -> Literal["min", "max"]:
    """Whether the best value of train.best_metric is its lowest or its highest."""
    return mode or ("max" if metric in MORE_IS_BETTER else "min")


@dataclass(frozen=True)
class GenerateOptions:
    """Decoding held-out prompts while a run trains: what an eval loss does not show."""

    every: int | None = option(
        None,
        "steps between greedy decodings of a held-out sample, besides the one after the last step; "
        "default: never",
        at_least(1),
    )
    examples: int = option(64, "evaluation examples in the sample", at_least(1))
    batch_size: int = option(
        16, "prompts decoded together, rounded up to a multiple of the devices", at_least(1)
    )
    max_new_tokens: int = option(256, "an answer that has not ended by then is cut", at_least(1))
    scorer: Literal["gsm", "intent", "text"] | None = option(
        None,
        "what must match: the last number (gsm), intent and slots (intent) or the text; default: "
        "told from the expected answers",
    )
