"""LoRA on a JSONL file of your own, then the share of held-out rows that the model answers exactly.

    python -m examples.lora_on_my_data --model allenai/OLMoE-1B-7B-0125 --data rows.jsonl \
        --output runs/mine

A row is {"prompt": …, "completion": …}; docs/training.md has the other formats. Every tenth row is
held out. Run the command again to continue after an interruption.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp

import olmoe_jax
from olmoe_jax import config as options
from olmoe_jax.data import load_tokenizer
from olmoe_jax.model.config import ModelSettings


def train_and_score(model: str, data: Path, output: Path, *, rate: float, epochs: int) -> float:
    """Trains adapters and the router with DenseMixer. Returns the exact match on held-out rows."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    held_out, trained = rows[::10], [row for i, row in enumerate(rows) if i % 10]
    output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", trained), ("test", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    config = options.Config(
        model=options.ModelOptions(path=model),
        data=options.DataOptions(
            train_path=f"{output}/train.jsonl",
            eval_path=f"{output}/test.jsonl",
            max_seq_length=1024,
        ),
        method=options.MethodOptions(name="densemixer", lora_rank=16),
        optimizer=options.OptimizerOptions(learning_rate=rate),
        train=options.TrainOptions(output_dir=f"{output}/run", batch_size=32, epochs=epochs),
    )
    run = olmoe_jax.train(config).output_dir  # docs/serving.md: what loads run/adapter

    # Without `settings` the model would be loaded in float32, which takes twice the memory.
    settings = ModelSettings(compute_dtype=jnp.bfloat16)
    tuned, tokenizer = olmoe_jax.from_pretrained(run, settings=settings), load_tokenizer(model)
    prompts = [row["prompt"] for row in held_out]
    answers = olmoe_jax.generate(tuned, tokenizer, prompts, max_new_tokens=128)
    pairs = zip(answers, held_out, strict=True)
    return sum(a.strip() == row["completion"].strip() for a, row in pairs) / len(held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub id or directory")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file")
    parser.add_argument("--output", required=True, type=Path, help="directory for all files")
    args = parser.parse_args()
    share = train_and_score(args.model, args.data, args.output, rate=1e-4, epochs=4)
    print(f"exact match on held-out rows: {share:.1%}")
