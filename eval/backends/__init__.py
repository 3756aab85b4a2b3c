"""What continues the prompts: this project's decoder, transformers or vLLM.

All get the same prompts as token ids without special tokens, decode greedily or at a temperature,
end at the tokenizer's eos and decode the new tokens with the same tokenizer.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError

BACKENDS = ("jax", "hf", "vllm")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Sampling:
    """How a batch of prompts is continued.

    Attributes:
      temperature: 0 takes the most probable token.
      stop: strings that end a text; one from a backend that ignores them is cut afterwards.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    stop: Sequence[str]


class Backend(Protocol):
    """A model, loaded."""

    context: int
    """Tokens that a prompt and its continuation may have together."""

    def count(self, prompt: str) -> int:
        """The prompt's tokens."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The continuations."""


def check_backend(name: str, model: str, adapter: str | None = None) -> None:
    """Makes sure that a backend can load a model, without loading it.

    Raises:
      UserError: a package is not installed, the backend does not read this kind of checkpoint, or
        the adapter is none of this model.
    """
    if name == "jax":
        if adapter:
            from olmoe_jax.checkpoints.opening import open_source
            from olmoe_jax.checkpoints.peft import read_adapter

            read_adapter(adapter, open_source(model).config)
        return
    if name == "vllm" and adapter:
        raise UserError(
            f"--adapter {adapter}: --backend vllm reads no adapters; merge it (python -m "
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


def open_backend(name: str, model: str, compute_dtype: str, adapter: str | None = None) -> Backend:
    """Loads a model that `check_backend` accepts.

    Raises:
      UserError: it cannot be loaded.
    """
    from eval.backends.hf import HfBackend
    from eval.backends.jax import JaxBackend
    from eval.backends.vllm import VllmBackend

    if name == "vllm":
        return VllmBackend(model, compute_dtype)
    return {"jax": JaxBackend, "hf": HfBackend}[name](model, compute_dtype, adapter)


class Prompts:
    """What the backends share: the tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the eos token."""
        tokens = list(tokens)
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)

    def count(self, prompt: str) -> int:
        return len(self.encode(prompt))
