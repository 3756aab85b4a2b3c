"""The experiments: the paper's methods on its data sets, with the hyperparameters of the reference.

The defaults of `olmoe_jax.config` give the rest, which depends on neither: 4 epochs, 256 examples
per step, 4096 tokens, the schedule.
"""

from dataclasses import dataclass, replace

from olmoe_jax.config import Config, DataOptions, MethodOptions, OptimizerOptions, TrainOptions
from olmoe_jax.errors import UserError

FULL = ("frozen", "conventional", "densemixer")
LORA = tuple(f"{method}_lora" for method in FULL)
ESFT = ("esft_gate", "esft_token")
EXPERIMENTS = (*FULL, *LORA, *ESFT)


@dataclass(frozen=True)
class Dataset:
    """A data set and its hyperparameters: a row of the table."""

    hub_id: str
    eval_file: str | None  # None: a tenth of the training examples is held out
    full_learning_rate: float
    lora_learning_rate: float
    esft_learning_rate: float
    microbatch_examples: int  # per device in the reference


# fmt: off
DATASETS = {
    #                                                                    full  LoRA  ESFT
    "gsm":         Dataset("RoxanneWsyw/gsm",              "test.jsonl", 1e-6, 1e-4, 2e-5, 4),
    "codealpaca":  Dataset("RoxanneWsyw/CodeAlpaca",       None,         1e-6, 1e-4, 2e-5, 4),
    "intent":      Dataset("RoxanneWsyw/ESFT-intent",      "test.jsonl", 2e-5, 4e-4, 1e-3, 4),
    "law":         Dataset("RoxanneWsyw/ESFT-law",         "test.jsonl", 2e-5, 4e-4, 1e-3, 4),
    "summary":     Dataset("RoxanneWsyw/ESFT-summary",     "test.jsonl", 2e-5, 1e-4, 5e-3, 2),
    "translation": Dataset("RoxanneWsyw/ESFT-translation", "test.jsonl", 2e-5, 4e-4, 5e-3, 2),
}
# fmt: on


def experiment(method: str, dataset: str) -> Config:
    """Returns the config of a method on a data set: one cell of the table."""
    if method not in EXPERIMENTS:
        raise UserError(
            f"{method} is none of the paper's methods: build on one of {', '.join(EXPERIMENTS)}"
        )
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset}: write one of {', '.join(DATASETS)}")
    row = DATASETS[dataset]
    learning_rate = row.full_learning_rate
    options = MethodOptions(name=method.removesuffix("_lora"))
    if method in LORA:
        learning_rate = row.lora_learning_rate
        options = replace(options, lora_rank=64, lora_alpha=16.0, lora_dropout=0.1)
    elif method in ESFT:
        learning_rate = row.esft_learning_rate
    return Config(
        method=options,
        data=DataOptions(
            train_path=f"{row.hub_id}:train.jsonl",
            eval_path=f"{row.hub_id}:{row.eval_file}" if row.eval_file else None,
            eval_fraction=0.1,
        ),
        optimizer=OptimizerOptions(learning_rate=learning_rate),
        train=TrainOptions(
            output_dir=f"runs/{method}_{dataset}",
            microbatch_examples=row.microbatch_examples,
        ),
    )
