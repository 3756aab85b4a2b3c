"""Backends that continue prompts: this project's decoder, transformers or vLLM.

Every backend gets the same prompts as token ids without special tokens, decodes greedily or at a
temperature, ends at every id that the model directory names, at the tokenizer's eos and at the chat
template's end of a turn, and decodes the new tokens with the same tokenizer.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError
from olmoe_jax.generation.chat import open_format

BACKENDS = ("jax", "hf", "vllm")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sampling:
    """How a batch of prompts is continued; a text is cut before the first string of `stop`."""

    max_new_tokens: int  # a text that has not ended by then is cut
    temperature: float  # 0 takes the most probable token
    seed: int  # of the draws above 0
    stop: Sequence[str]
    top_p: float = 1.0  # draws from the fewest tokens with this probability together; 1: from all
    top_k: int = 0  # draws from so many most probable tokens; 0: from all


class Backend(Protocol):
    """A loaded model."""

    context: int  # tokens that prompt and continuation may have together: the model's positions

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens."""

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
            from olmoe_jax.checkpoints.opening import check_adapter, open_source
            from olmoe_jax.checkpoints.peft import read_adapter

            source = open_source(model, base=base)
            if adapter:
                check_adapter(source, model, adapter)
                read_adapter(adapter, source.config)
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
    chat_template: str = "none",
) -> Backend:
    """Loads a model that `check_backend` accepts; `tokenizer` replaces the model's.

    `chat_template` is as for `Prompts`.

    Raises:
      UserError: the model cannot be loaded.
    """
    from eval.backends.hf import HfBackend
    from eval.backends.jax import JaxBackend
    from eval.backends.vllm import VllmBackend

    if name == "vllm":
        return VllmBackend(model, compute_dtype, tokenizer, chat_template)
    if name == "hf":
        return HfBackend(model, compute_dtype, adapter, tokenizer, chat_template)
    return JaxBackend(model, compute_dtype, adapter, base, tokenizer, chat_template)


class Prompts:
    """The tokenizer's part of every backend.

    Args:
      files: the model's directory.
      adapter: the model's adapter, or None.
      tokenizer: a directory or hub id whose tokenizer replaces the model's, or None.
      chat_template: "none", "auto" (the tokenizer's own) or a file: what makes a user's turn, and
        the begin of an assistant's, of each prompt.

    Attributes:
      tokenizer: the tokenizer.
      ends: the token ids that end a text.

    Raises:
      UserError: tokenizer or template are missing or wrong.
    """

    def __init__(
        self,
        files: Path,
        adapter: str | None = None,
        tokenizer: str | None = None,
        chat_template: str = "none",
    ):
        self._format = open_format(chat_template, files, adapter, tokenizer)
        self.tokenizer, self.ends = self._format.tokenizer, self._format.ends

    @property
    def template(self) -> str | None:
        """A hash of the chat template, or None."""
        template = self._format.rules.template
        return template and template.digest[:16]

    @property
    def note(self) -> str | None:
        """A line on the chat template that prompts have, or could have; None: there is none."""
        if self._format.rules.template:
            return f"prompts: a user's turn each, by {self._format.rules.describe()}"
        if self.tokenizer.chat_template:
            return (
                "note: prompts are texts, though the model has a chat template; for a model that "
                "was trained on messages add --chat_template auto"
            )
        return None

    def text(self, prompt: str) -> str:
        """Returns what the model continues."""
        if self._format.rules.template is None:
            return prompt
        return self._format.prompt([{"role": "user", "content": prompt}])

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens, without special tokens but those of the chat template."""
        return self.tokenizer(self.text(prompt), add_special_tokens=False, verbose=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of the tokens up to the first that ends one."""
        ended = (place for place, token in enumerate(tokens) if token in self.ends)
        return self.tokenizer.decode(list(tokens)[: next(ended, len(tokens))])
