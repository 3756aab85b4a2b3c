"""Times greedy decoding against transformers' generate: python -m benchmarks.generation

Both sides decode the same prompts with the same random float32 model on the same CPU cores, all new
tokens of all rows. In each round each side runs once, in its own process, one after the other. A
side's time is the best of all its runs. PyTorch's threads spin while they wait: on a busy machine
write --threads 1 and compare the CPU time. The first run makes PyTorch's virtual environment.
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.compare_pytorch import VENVS, make_venv, result_of
from benchmarks.machine import machine
from benchmarks.random_model import write_random_model
from benchmarks.shapes import Shape, add_shape_flags, shape_of
from benchmarks.timing import in_rounds, use_cores
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.parallel.cpu import use_all_cores
from olmoe_jax.root import ROOT

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from olmoe_jax.model.decoder import Olmoe

PYTORCH = "transformers5"


def main(arguments: Sequence[str]) -> None:
    args = parser().parse_args(arguments)
    use_cores(args.threads)
    if args.model:
        print(json.dumps(measure(args)))
        return
    python = args.venvs.absolute() / PYTORCH / "bin" / "python"
    make_venv(args.venvs.absolute() / PYTORCH, VENVS[PYTORCH])
    with tempfile.TemporaryDirectory() as model:
        write_random_model(Path(model), shape_of(args))
        same = [
            *shape_flags(shape_of(args)),
            *(f"--model={model}", f"--new_tokens={args.new_tokens}"),
            *(f"--repeats={args.repeats}", f"--threads={args.threads}"),
        ]
        sides = {
            "ours": [sys.executable, "-m", "benchmarks.generation", *same],
            "transformers 5.23.0": [python, "-m", "benchmarks.pytorch_generation", *same],
        }
        runs = in_rounds(
            {side: functools.partial(result_of, command) for side, command in sides.items()},
            args.rounds,
        )
    print(machine(), report(runs), sep="\n\n")


def parser() -> ArgumentParser:
    """Returns a parser of all flags."""
    result = ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    add_shape_flags(result)
    result.set_defaults(rows=16, length=64)
    result.add_argument("--new_tokens", type=whole_number(1), default=128)
    result.add_argument("--rounds", type=whole_number(1), default=3)
    result.add_argument("--repeats", type=whole_number(1), default=2, help="timed runs per process")
    result.add_argument("--threads", type=whole_number(1), default=2, help="CPU cores to use")
    result.add_argument("--venvs", type=user_path, default=ROOT / "build" / "pytorch")
    result.add_argument("--model", help="measure only ours, on this Hugging Face directory")
    return result


def shape_flags(shape: Shape) -> list[str]:
    """Returns the flags that give this shape."""
    sizes = dataclasses.asdict(shape).items()
    return [f"--{name}={value}" for name, value in sizes if isinstance(value, int)]


class Ids:
    """A tokenizer that writes texts as token ids, separated by spaces.

    Args:
      tokenizer: reads texts; None: they are written as ids too, and no token ends one.
    """

    def __init__(self, tokenizer: Any = None):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id if tokenizer else -1

    def __call__(self, text: str, **options: Any) -> Any:
        if self._tokenizer:
            return self._tokenizer(text, **options)
        return SimpleNamespace(input_ids=[int(number) for number in text.split()])

    def decode(self, tokens: Iterable[int]) -> str:
        return " ".join(map(str, tokens))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes with our side and the model's weights. Returns times and tokens."""
    use_all_cores()
    import olmoe_jax
    from olmoe_jax.parallel import sharding

    shape = shape_of(args)
    mesh = sharding.decoding_mesh(shape.experts)
    model = olmoe_jax.from_pretrained(args.model, mesh)
    return decode(model, mesh, shape, args.new_tokens, args.repeats)


def decode(
    model: "Olmoe", mesh: "Mesh", shape: Shape, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Generates once to compile, then `repeats` times. Returns times and tokens."""
    import jax

    import olmoe_jax

    numbers = Ids()
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (shape.rows, shape.length))
    texts = [numbers.decode(row) for row in prompts]
    runs = []
    for _ in range(repeats + 1):
        cpu, start = time.process_time(), time.perf_counter()
        with jax.set_mesh(mesh):
            new = olmoe_jax.generate(
                model, numbers, texts, max_new_tokens=new_tokens, batch_size=shape.rows
            )
        runs.append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        "seconds": [wall for wall, _ in runs[1:]],
        "cpu_seconds": [cpu for _, cpu in runs[1:]],
        "tokens": [numbers(text).input_ids for text in new],
    }


def report(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Returns a text with the best times, their ratios, and the share of equal tokens."""
    best = {
        side: [min(min(run[what]) for run in of_side) for what in ("seconds", "cpu_seconds")]
        for side, of_side in runs.items()
    }
    (ours, theirs), tokens = best.values(), [np.array(of[0]["tokens"]) for of in runs.values()]
    lines = [f"{side}: {wall:.2f} s, {cpu:.2f} CPU seconds" for side, (wall, cpu) in best.items()]
    lines.append(f"ratio: {theirs[0] / ours[0]:.2f}, of CPU time {theirs[1] / ours[1]:.2f}")
    lines.append(f"same tokens: {(tokens[0] == tokens[1]).mean():.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
