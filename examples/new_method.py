"""A method in a file of its own: only the attention's weights train.

    python -m examples.new_method --model allenai/OLMoE-1B-7B-0125 --data rows.jsonl \
        --output runs/attention_only

The class says what differs from full fine-tuning, and `register` makes `method.name=attention_only`
known. A method for everybody goes to olmoe_jax/methods/, its row to olmoe_jax/config/methods.py.
"""

import argparse
from pathlib import Path

import olmoe_jax
from olmoe_jax import config as options
from olmoe_jax.config.methods import MethodDeclaration, register
from olmoe_jax.methods import Method


class AttentionOnly(Method):
    """Only the attention's weights train; gradient passes through the experts and the router."""

    def trains(self, name: str) -> bool:
        return ".attention." in name


register(
    MethodDeclaration(
        name="attention_only",
        help="the attention's weights",
        implementation="examples.new_method:AttentionOnly",
    )
)


def train(model: str, data: Path, output: Path, *, rate: float, epochs: int) -> Path:
    """Trains with the new method. Returns the run's directory, with a checkpoint in hf/."""
    run = options.Config(
        model=options.ModelOptions(path=model),
        data=options.DataOptions(train_path=str(data), max_seq_length=1024),
        method=options.MethodOptions(name="attention_only"),
        optimizer=options.OptimizerOptions(learning_rate=rate),
        train=options.TrainOptions(output_dir=str(output), batch_size=32, epochs=epochs),
    )
    return olmoe_jax.train(run).output_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub id or directory")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file")
    parser.add_argument("--output", required=True, type=Path, help="directory of the run")
    args = parser.parse_args()
    print(train(args.model, args.data, args.output, rate=1e-5, epochs=4))
