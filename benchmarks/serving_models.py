"""The models of benchmarks.serving: every method trained a little, with and without a template.

Everything lies in one directory, and what is there already is not made again.
"""

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import merge_lora
from examples import chat as chat_example
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import (
    Config,
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
)
from olmoe_jax.config.methods import METHODS
from olmoe_jax.files import write_json_lines
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.quickstart import MODEL, examples, train_tokenizer

PROMPTS, NEW_TOKENS = 20, 40
RANK = 8
TURNS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML, whose turns end in a token that is not the tokenizer's eos."""
SYSTEM = "Write the sum first."


@dataclass(frozen=True)
class Case:
    """An export or adapter that a server loads."""

    method: str  # and whether adapters trained, for people
    kind: str  # "export", "adapter" or "merged adapter"
    chat: bool  # whether prompts are conversations
    prompts: Path  # a file of JSON lines
    model: Path  # the directory of the model, an adapter's base
    adapter: Path | None = None  # the directory of the adapter

    @property
    def name(self) -> str:
        """The name that the flag --only looks at."""
        return f"{self.method}, {self.kind}, {'chats' if self.chat else 'texts'}"

    @property
    def tokenizer(self) -> Path:
        """The directory with the tokenizer and the chat template."""
        return self.adapter or self.model


def make_cases(output: Path) -> list[Case]:
    """Trains and exports what is missing in a directory; returns all cases."""
    keep_programs()
    inputs = _inputs(output / "inputs")
    base = ModelOptions(
        path=str(inputs), init="random", config_path=str(inputs), compute_dtype="float32"
    )
    pretrained = _train(base, "rows", MethodOptions(), output / "base", 200, 32)
    return [*_cases(output, pretrained / "hf"), _chat_example(output)]


def _chat_example(output: Path) -> Case:
    """Returns the case of the model of examples/chat.py, whose prompts have earlier answers."""
    inputs, run = output / "chat_example_inputs", output / "chat_example"
    if not (run / "hf").exists():
        chat_example.train(inputs, run)
        draw = random.Random(1)
        prompts = [chat_example.conversation(draw)[:-1] for _ in range(PROMPTS)]
        write_json_lines(inputs / "prompts.jsonl", prompts)
    return Case("examples/chat.py", "export", True, inputs / "prompts.jsonl", run / "hf")


def _cases(output: Path, base: Path) -> Iterator[Case]:
    model = ModelOptions(path=str(base), compute_dtype="float32")
    for chat in (False, True):
        rows = "chats" if chat else "rows"
        prompts = output / "inputs" / ("chat_prompts.jsonl" if chat else "prompts.jsonl")
        for name, row in METHODS.items():
            scored = {"esft_score_tokens": 5000} if "esft_score_tokens" in row.own_fields else {}
            options = MethodOptions(name, **scored)
            run = _train(model, rows, options, output / f"{name}_{rows}", 30, 8)
            yield Case(name, "export", chat, prompts, run / "hf")
            if not row.has_adapters:
                continue
            options = MethodOptions(name, lora_rank=RANK)
            run = _train(model, rows, options, output / f"{name}_lora_{rows}", 30, 8)
            merged = run / "merged"
            if not merged.exists():
                flags = ("--model", base, "--adapter", run / "adapter", "--output", merged)
                merge_lora.main([str(flag) for flag in flags])
            case = functools.partial(Case, f"{name}, LoRA", chat=chat, prompts=prompts)
            yield case(kind="merged adapter", model=merged)
            yield case(kind="adapter", model=base, adapter=run / "adapter")


def _train(
    model: ModelOptions, rows: str, method: MethodOptions, output: Path, steps: int, batch: int
) -> Path:
    """Trains on the rows of a kind, unless that has been done; returns the run's directory."""
    import olmoe_jax

    inputs = output.parent / "inputs"
    config = Config(
        model=model,
        data=DataOptions(
            train_path=str(inputs / f"{rows}.jsonl"),
            eval_fraction=0.0,
            tokenizer_path=str(inputs),
            chat_template=str(inputs / "chat.jinja") if rows == "chats" else None,
            max_seq_length=128,
        ),
        method=method,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        train=TrainOptions(
            output_dir=str(output),
            batch_size=batch,
            epochs=100,
            max_steps=steps,
            rows_per_device=batch // 2,
        ),
    )
    if any((output / export).exists() for export in ("hf", "adapter")):
        return output
    return olmoe_jax.train(config).output_dir


def _inputs(path: Path) -> Path:
    """Writes rows and chats of word problems, a tokenizer, a template and config.json."""
    if path.exists():
        return path
    from tokenizers import Tokenizer

    problems = examples(2000 + PROMPTS, seed=0)
    with directory.new_directory(path) as partial:
        known = [row["prompt"] + " " + row["completion"] for row in problems[PROMPTS:]]
        fields = train_tokenizer(known, 512, partial)
        tokenizer = Tokenizer.from_file(str(partial / "tokenizer.json"))
        fields["vocab_size"] += tokenizer.add_special_tokens(list(TURNS))
        tokenizer.save(str(partial / "tokenizer.json"))
        directory.write_json(partial / "config.json", MODEL | fields)
        (partial / "chat.jinja").write_text(TEMPLATE)
        write_json_lines(partial / "rows.jsonl", problems[PROMPTS:])
        chats = [
            {"messages": [*chat, _turn("assistant", row["completion"])]}
            for chat, row in zip(_chats(problems), problems, strict=True)
        ]
        write_json_lines(partial / "chats.jsonl", chats[PROMPTS:])
        write_json_lines(partial / "prompts.jsonl", [row["prompt"] for row in problems[:PROMPTS]])
        write_json_lines(partial / "chat_prompts.jsonl", _chats(problems[:PROMPTS]))
    return path


def read_prompts(case: Case) -> list[Any]:
    """Returns the texts, or with `case.chat` the conversations, of a case."""
    return [json.loads(line) for line in case.prompts.read_text().splitlines()]


def _chats(problems: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Returns conversations that end with a question; every second one has a system turn."""
    questions = [row["prompt"].removesuffix("\nAnswer:") for row in problems]
    return [
        [*[_turn("system", SYSTEM)] * (index % 2), _turn("user", question)]
        for index, question in enumerate(questions)
    ]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
