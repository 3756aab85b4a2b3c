"""The model and batch sizes that the benchmarks share. Needs no package."""

import argparse
import dataclasses
from typing import Any

from olmoe_jax.errors import whole_number


@dataclasses.dataclass(frozen=True)
class Shape:
    """An architecture and its batch of `rows` rows, each of `length` tokens."""

    layers: int
    hidden: int
    intermediate: int  # of one expert
    heads: int
    experts: int
    experts_per_token: int
    vocab: int
    rows: int
    length: int
    compute_dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.rows * self.length

    def hf_config(self) -> dict[str, Any]:
        """Returns the architecture as the content of a Hugging Face config.json."""
        return {
            "model_type": "olmoe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "max_position_embeddings": max(4096, self.length),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "eos_token_id": None,
            "bos_token_id": None,
        }


SHAPES = {
    "tiny": Shape(2, 64, 32, 4, 8, 2, vocab=256, rows=2, length=32),
    "mid": Shape(4, 512, 256, 8, 64, 8, vocab=2048, rows=4, length=256),
    # OLMoE-1B-7B, too large for a CPU.
    "full": Shape(
        16, 2048, 1024, 16, 64, 8, vocab=50304, rows=1, length=4096, compute_dtype="bfloat16"
    ),
}
"""Shapes by name. A step of `mid` spends its time in the experts; with vocab=50304, in the head."""


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--shape`, and a flag for each size that overrides the shape's."""
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    for field in dataclasses.fields(Shape):
        if field.type is int:
            text = "default: the shape's"
            parser.add_argument(f"--{field.name}", type=whole_number(1), help=text)
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"))


def shape_of(args: argparse.Namespace) -> Shape:
    """Returns the shape that the flags of `add_shape_flags` ask for."""
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(SHAPES[args.shape], **given)
