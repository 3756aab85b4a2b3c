"""Fine-tunes a model with transformers' Trainer as a user would, for whole_job.

The rows of JSON lines ("prompt", "completion") are padded to the longest of their batch, the
prompt's tokens have no loss, and the model is saved at the end. The script needs torch,
transformers and accelerate.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True, help="examples per step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    args = parser.parse_args()
    print(f"loss of the last step: {train(args):.4f}")


def train(args: argparse.Namespace) -> float:
    """Trains and saves; returns the last step's loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"]).input_ids
        tokens = tokenizer(f"{row['prompt']} {row['completion']}{tokenizer.eos_token}").input_ids
        return {"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        batch = {
            name: torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in rows])
            for name, pad in padding.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    rows = [encode(json.loads(line)) for line in args.data.read_text().splitlines()]
    options = TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = Trainer(model, options, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model(args.output)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]


if __name__ == "__main__":
    main()
