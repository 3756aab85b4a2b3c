"""The agreement of cheaper router gradients with full DenseMixer's, on held-out rows.

    python -m benchmarks.router_cosine --model RUN/hf --data ROWS.jsonl

The script prints the cosines for m experts and for lower precision.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import olmoe_jax
from olmoe_jax import data
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import Olmoe
from olmoe_jax.model.parameters import ROUTER, split
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.training.step import Trainer


def router_cosines(model: Olmoe, batch: DeviceBatch) -> dict[str, float]:
    """Returns the cosine of the router gradient of m experts with the full one, by m.

    m is K, 2K, 4K and E, where a token selects K of E experts; m = K is the conventional gradient.
    """
    per_token, experts = model.config.num_experts_per_token, model.config.num_experts
    limits = sorted({min(per_token * factor, experts) for factor in (1, 2, 4)} | {experts})
    return {str(m): router_cosine(model, batch, m) for m in limits}


def router_cosine(model: Olmoe, batch: DeviceBatch, m: int) -> float:
    """Returns the cosine of the router gradient of m experts with the full one.

    All layers' router weights together form one vector.
    """
    return _cosine(_router_gradient(model, batch, m), _router_gradient(model, batch))


def precision_cosines(model: Olmoe, batch: DeviceBatch) -> dict[str, float]:
    """Returns the cosine of the gradient in lower precision with the full one, by dtype.

    The dtypes are those of `method.router_gradient_dtype`.
    """
    full = _router_gradient(model, batch)
    return {
        dtype: _cosine(_router_gradient(model, batch, dtype=dtype), full)
        for dtype in ("bfloat16", "float8_e4m3fn")
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _router_gradient(
    model: Olmoe, batch: DeviceBatch, limit: int | None = None, dtype: str | None = None
) -> np.ndarray:
    """Returns DenseMixer's gradient with m = `limit`, float64 [L * D * E]."""
    frozen = split(model)[1]
    router = {ROUTER: frozen.pop(ROUTER)}
    trainer = _trainer(
        model,
        dense_router_gradient=True,
        router_gradient_experts=limit,
        router_gradient_dtype=dtype,
    )
    gradients, _ = _gradients(trainer, router, frozen, batch)
    return np.asarray(gradients[ROUTER], np.float64).ravel()


@functools.partial(jax.jit, static_argnums=0)
def _gradients(trainer: Trainer, *arguments: Any) -> Any:
    """Returns the gradients of the loss, and its other results. Equal trainers share a program."""
    return jax.grad(trainer.loss, has_aux=True)(*arguments)


def batches(
    file: Path, tokenizer_files: Path, *, length: int, rows: int, pack: bool
) -> list[DeviceBatch]:
    """Returns a file's examples in batches of `rows` rows of `length` tokens, in their order."""
    tokenizer = data.load_tokenizer(str(tokenizer_files))
    found = data.evaluation_batches(
        data.tokenize_dataset(str(file), tokenizer, length),
        max_seq_length=length,
        pack=pack,
        rows_per_batch=rows,
        pad_id=tokenizer.pad_token_id,
    )
    return [DeviceBatch(*(getattr(b, name) for name in DeviceBatch._fields)) for b in found]


def _trainer(model: Olmoe, **settings: Any) -> Trainer:
    """Returns a trainer for gradients; it cannot update."""
    return Trainer(model.config, ModelSettings(**settings), None, None, 1.0)


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.router_cosine", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint, with tokenizer")
    parser.add_argument("--data", required=True, help="rows that the model was not trained on")
    parser.add_argument("--rows", type=whole_number(1), default=8, help="rows of 256 tokens")
    args = parser.parse_args(arguments)
    model = olmoe_jax.from_pretrained(args.model)
    batch = batches(args.data, args.model, length=256, rows=args.rows, pack=True)[0]
    for name, cosine in (router_cosines(model, batch) | precision_cosines(model, batch)).items():
        print(f"{name:14s} {cosine:.6f}")


if __name__ == "__main__":
    run_command(main)
