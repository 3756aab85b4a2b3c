"""DenseMixer on generated word problems with a small random OLMoE: minutes on a CPU."""

from pathlib import Path

from olmoe_jax.config import (
    Config,
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
)
from olmoe_jax.quickstart import write_inputs


def get_config() -> Config:
    """Returns the config; makes its data set in runs/quickstart_inputs if that is missing."""
    inputs = str(write_inputs(Path("runs/quickstart_inputs")))
    return Config(
        model=ModelOptions(
            path=inputs,
            init="random",
            config_path=inputs,
            compute_dtype="float32",
            remat="none",
        ),
        data=DataOptions(
            train_path=f"{inputs}/train.jsonl",
            eval_path=f"{inputs}/test.jsonl",
            # Four examples, of 44 to 54 tokens, fill a row, and the 64 of a step 16 rows.
            max_seq_length=208,
        ),
        method=MethodOptions(name="densemixer"),
        optimizer=OptimizerOptions(learning_rate=3e-3),
        train=TrainOptions(
            output_dir="runs/quickstart", batch_size=64, epochs=5, rows_per_device=16
        ),
    )
