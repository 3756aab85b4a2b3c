"""GPU hours of the cells of the paper's table, by arithmetic: python -m benchmarks.reproduce_hours

Training costs the executed FLOPs per token (`olmoe_jax.model.flops`) times the tokens of all
epochs, and for ESFT the forward pass that scores the experts. Evaluation costs the prompts' forward
pass, and for each batch of 64 prompts the reading of the bfloat16 weights once per new token. Both
run at an assumed share of an H100's peak. Starting, loading, compiling, checkpoints, exports and
the judge are left out. The script compiles and runs nothing.

The tokens are those of OLMoE's tokenizer on the data files beside the project (shared/data). For
CodeAlpaca, the mean of a sample stands for all examples. The training files of summary and
translation are not among the data files: their hours are for 10,000 examples of 1,000 tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from configs.table import DATASETS, ESFT, EXPERIMENTS, experiment
from eval.reproduce.cells import tasks_of
from eval.tasks import TASKS
from olmoe_jax import methods
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.flops import StepFlops, step_flops_per_token
from olmoe_jax.plan.devices import KINDS
from olmoe_jax.plan.planning import OLMOE_1B_7B as MODEL
from olmoe_jax.plan.planning import TUNED_EXPERTS
from olmoe_jax.training.base_model import compute_settings

H100 = KINDS["h100"]
BATCH = 64  # prompts decoded together


class Size(NamedTuple):
    """The size of a data set: its examples, and the tokens of all examples together."""

    examples: int
    tokens: int


TRAINING = {
    "gsm": Size(7_473, 1_174_978),
    "codealpaca": Size(18_020, 18_020 * 128),  # nine tenths of 20,022
    "intent": Size(7_280, 675_877),
    "law": Size(927, 449_226),
    "summary": Size(10_000, 10_000_000),
    "translation": Size(10_000, 10_000_000),
}
PROMPTS = {
    "gsm": Size(1_319, 91_343),
    "mbpp": Size(500, 325_948),
    "humaneval": Size(164, 23_265),
    "intent": Size(500, 774_254),
    "law": Size(100, 230_285),
    "summary": Size(100, 272_964),
    "translation": Size(100, 324_812),
}


def main(arguments: Sequence[str]) -> None:
    """Prints the hours of each cell as a Markdown table."""
    parser = ArgumentParser(prog="python -m benchmarks.reproduce_hours", description=__doc__)
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the peak (0.3)")
    share = parser.parse_args(arguments).utilisation
    if not 0.001 <= share <= 1:
        raise UserError(f"--utilisation={share}: write a share of the peak, 0.001 to 1")
    print(f"GPU hours at {share:.0%} of an H100's peak")
    print(f"| method | {' | '.join(DATASETS)} | all |")
    print("| --- |" + " ---: |" * (len(DATASETS) + 1))
    total = 0.0
    for method in EXPERIMENTS:
        hours = [training_hours(method, dataset, share) for dataset in DATASETS]
        total += sum(hours)
        print(row(f"`{method}`", hours))
    hours = [evaluation_hours(dataset, share) for dataset in DATASETS]
    total += (len(EXPERIMENTS) + 1) * sum(hours)
    print(row("evaluation, of each method and the base", hours))
    print(f"together: {total:.0f} GPU hours")


def row(name: str, hours: list[float]) -> str:
    """Returns a row of the table with its sum."""
    return f"| {name} | {' | '.join(f'{h:.3f}' for h in [*hours, sum(hours)])} |"


def step_flops(method: str, dataset: str) -> StepFlops:
    """Returns a run's FLOPs per token; ESFT is assumed to tune TUNED_EXPERTS experts per layer."""
    config = experiment(method, dataset)
    chosen, _ = methods.build(config.method, MODEL).for_plan(0, TUNED_EXPERTS)
    settings = chosen.model_settings(compute_settings(config))
    size = TRAINING[dataset]
    # Positions attend to half of their example on average.
    context = size.tokens / size.examples / 2
    return step_flops_per_token(MODEL, settings, chosen.trains, context)


def training_hours(method: str, dataset: str, share: float) -> float:
    """Returns the hours of one training run, ESFT's scoring included."""
    config, tokens = experiment(method, dataset), TRAINING[dataset].tokens
    flops = step_flops(method, dataset)
    work = config.train.epochs * tokens * flops.executed
    if method in ESFT:
        work += min(tokens, config.method.esft_score_tokens) * flops.forward
    return work / (share * H100.flops) / 3600


def evaluation_hours(dataset: str, share: float) -> float:
    """Returns the hours of evaluating one model on a data set's tasks, on one GPU."""
    weights = 2 * sum(math.prod(spec.shape) for spec in parameter_specs(MODEL).values())
    seconds = 0.0
    for task in tasks_of(dataset):
        examples, tokens = PROMPTS[task]
        context = tokens / examples / 2
        flops = step_flops_per_token(MODEL, ModelSettings(), lambda name: False, context)
        seconds += tokens * flops.forward / (share * H100.flops)
        # A decode step is bound by memory: it reads all weights for one token of each prompt.
        steps = math.ceil(examples / BATCH) * TASKS[task].max_new_tokens
        seconds += steps * weights / (share * H100.bandwidth)
    return seconds / 3600


if __name__ == "__main__":
    run_command(main)
