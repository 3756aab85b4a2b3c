"""Backends that continue prompts: this project's decoder, transformers or vLLM.

Every backend gets the same prompts as token ids without special tokens, decodes greedily or at a
temperature, ends at the tokenizer's eos and decodes the new tokens with the same tokenizer.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BACKENDS = ("jax", "hf", "vllm")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sampling:
    """How a batch of prompts is continued.

    Attributes:
      max_new_tokens: a text that has not ended by then is cut.
      temperature: 0 takes the most probable token.
      seed: of the draws above 0.
      stop: strings that end a text, which is cut before the first of them.
      top_p: draws from the fewest tokens with this probability together; 1: from all.
      top_k: draws from so many most probable tokens; 0: from all.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    stop: Sequence[str]
    top_p: float = 1.0
    top_k: int = 0


class Backend(Protocol):
    """A loaded model.

    Attributes:
      context: tokens that a prompt and its continuation may have together: the model's positions.
    """

    context: int

    def count(self, prompt: str) -> int:
        """Returns the number of the prompt's tokens."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Returns the continuations."""


def check_backend(
    name: str, model: str, adapter: str | None = None, base: str | None = None
) -> None:
    """Makes sure that a backend can load a model, without loading the model.

    Raises:
      UserError: a package is not installed, the backend does not read this kind of checkpoint, or
        the adapter or the base is not for this model.
    """
    if name == "jax":
        if adapter or base:
            from olmoe_jax.checkpoints.opening import open_source
            from olmoe_jax.checkpoints.peft import read_adapter

            config = open_source(model, base=base).config
            if adapter:
                read_adapter(adapter, config)
        return
    if base:
        raise UserError(
            f"--base {base}: --backend {name} reads Hugging Face checkpoints, which need no base; "
            "leave --base or --backend out"
        )
    if name == "vllm" and adapter:
        raise UserError(
            f"--adapter {adapter}: --backend vllm reads no adapters; merge this one (python -m "
            f"convert.merge_lora --model {model} --adapter {adapter} --output DIR) and write "
            "--model DIR, or leave --backend out"
        )
    for package in {"hf": ["torch", *["peft"] * bool(adapter)], "vllm": ["vllm"]}[name]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--backend {name} needs {package} ({error}): pip install {package}, or leave "
                "--backend out to decode with jax"
            ) from None
    if not any(directory.resolve(model).glob("*.safetensors")):
        raise UserError(
            f"--model {model}: --backend {name} reads Hugging Face checkpoints; write the exported "
            f"one (a run's is in {model}/hf), or leave --backend out"
        )


def open_backend(
    name: str,
    model: str,
    compute_dtype: str,
    adapter: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
) -> Backend:
    """Loads a model that `check_backend` accepts; `tokenizer` replaces the model's.

    Raises:
      UserError: the model cannot be loaded.
    """
    from eval.backends.hf import HfBackend
    from eval.backends.jax import JaxBackend
    from eval.backends.vllm import VllmBackend

    if name == "vllm":
        return VllmBackend(model, compute_dtype, tokenizer)
    if name == "hf":
        return HfBackend(model, compute_dtype, adapter, tokenizer)
    return JaxBackend(model, compute_dtype, adapter, base, tokenizer)


class Prompts:
    """The tokenizer's part of every backend."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens, without special tokens."""
        return self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of the tokens up to the eos token."""
        tokens = list(tokens)
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)

    def count(self, prompt: str) -> int:
        """Returns the number of the prompt's tokens."""
        return len(self.encode(prompt))
