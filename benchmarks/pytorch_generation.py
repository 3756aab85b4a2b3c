"""Times transformers' `generate` for benchmarks.generation, in its own virtual environment.

The script needs only torch and transformers, and prints one line of JSON, the last one.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

from benchmarks.shapes import add_shape_flags, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_flags(parser)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps(measure(args)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Generates once to warm up, then `repeats` times: greedy, all new tokens of all rows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    shape = shape_of(args)
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (shape.rows, shape.length))
    prompts = torch.from_numpy(prompts)
    runs = []
    with torch.inference_mode():
        for _ in range(args.repeats + 1):
            cpu, start = time.process_time(), time.perf_counter()
            out = model.eval().generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
            )
            runs.append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        "seconds": [wall for wall, _ in runs[1:]],
        "cpu_seconds": [cpu for _, cpu in runs[1:]],
        "tokens": out[:, shape.length :].tolist(),
    }


if __name__ == "__main__":
    main()
