"""Decoding within a run: greedy answers to held-out prompts, compared by exact match."""

import dataclasses
import itertools
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.data.formats import format_row
from olmoe_jax.data.reading import read_source
from olmoe_jax.errors import UserError
from olmoe_jax.generation.answers import Scorer, exact_match, reference_number, scorer_for
from olmoe_jax.generation.decoding import generate
from olmoe_jax.model.parameters import ROUTER, Parameters, merge
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.sources import parse
from olmoe_jax.training.base_model import BaseModel
from olmoe_jax.training.datasets import Datasets
from olmoe_jax.training.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_SIZE = 16
"""Prompts decoded together; on more devices than this, one on each."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model beside the answer in the data."""

    prompt: str  # the text that the model continued
    expected: str  # the answer in the data
    output: str  # what the model wrote
    right: bool  # whether `output` matches `expected`


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A sample of the evaluation examples as texts, the longest prompt first."""

    tokenizer: "PreTrainedTokenizerBase"
    texts: list[tuple[str, str]]  # (prompt, expected answer) of each example
    scorer: Scorer  # how an answer is compared
    max_new_tokens: int  # the length at which an answer is cut
    ends: list[int]  # the token ids that end an answer

    def answers(self, program: Program, parameters: Parameters) -> list[Answer]:
        """Returns the answer to each prompt of the model with these trained parameters.

        Decoding changes nothing of the run. Call it under the run's mesh.
        """
        dtype = program.trainer.settings.compute_dtype
        # Decoding reads every weight once per token, so cast the weights once, not at each read.
        # `from_pretrained` gives the same dtypes.
        values = {
            name: value if name == ROUTER or isinstance(value, Quantized) else value.astype(dtype)
            for name, value in (parameters | program.frozen).items()
        }
        outputs = generate(
            merge(program.trainer.graph, values),
            self.tokenizer,
            [prompt for prompt, _ in self.texts],
            max_new_tokens=self.max_new_tokens,
            batch_size=max(_BATCH_SIZE, program.mesh.size),
            ends=self.ends,
            # `held_out_sample` chose these examples; as texts they may have other tokens.
            allow_extrapolation=True,
        )
        return [
            Answer(prompt, expected, output, exact_match(self.scorer, output, expected))
            for (prompt, expected), output in zip(self.texts, outputs, strict=True)
        ]


def held_out_sample(config: Config, model: BaseModel, datasets: Datasets) -> HeldOut | None:
    """Returns the examples that the run decodes, drawn by train.seed; None if the run decodes none.

    The model continues the prompt of an example, and its first answer is expected. An example is
    left out if it has no prompt, if the end of its first answer was cut, or if prompt and
    generate.max_new_tokens do not fit the model's positions together (unless
    model.allow_extrapolation says that they need not).

    Raises:
      UserError: no example is left.
    """
    options, evaluation = config.generate, datasets.evaluation
    if options.every is None or evaluation is None:
        return None
    tokenizer = data.load_tokenizer(str(model.tokenizer_files))
    positions, length = model.config.max_position_embeddings, config.data.max_seq_length
    room = length if config.model.allow_extrapolation else positions - options.max_new_tokens
    if room < 1:
        raise UserError(
            f"generate.max_new_tokens={options.max_new_tokens}: the model has {positions} "
            "positions, prompt included; write fewer, or generate.every=none"
        )
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for index in np.random.RandomState(config.train.seed).permutation(len(evaluation)):
        parts = evaluation.example(index).prompt_and_answer(datasets.ends)
        if parts and 0 < len(parts[0]) <= room:
            found.append(parts)
        if len(found) == options.examples:
            break
    if not found:
        why = f"{positions} positions of the model less {options.max_new_tokens} new tokens"
        change = "smaller generate.max_new_tokens"
        if room >= length:
            why, change = f"data.max_seq_length={length}", "larger data.max_seq_length"
        raise UserError(
            f"generate.every={options.every}: no evaluation example has a prompt of 1 to "
            f"{min(room, length)} tokens and a whole answer ({why}); write a {change}, or "
            "generate.every=none"
        )
    # Prompts of like length share a batch, so that few shapes are compiled.
    found.sort(key=lambda parts: -len(parts[0]))
    texts = [(str(tokenizer.decode(p)), str(tokenizer.decode(a))) for p, a in found]
    scorer = scorer_for([expected for _, expected in texts])
    for prompt, expected in texts if scorer == "gsm" else ():
        try:
            reference_number(expected)
        except ValueError as error:
            place = _place(config, datasets.rules, prompt, expected)
            raise UserError(f"{place}: generate.every compares this answer: {error}") from None
    return HeldOut(tokenizer, texts, scorer, options.max_new_tokens, datasets.ends)


def _place(config: Config, rules: data.RowRules, prompt: str, answer: str) -> str:
    """Returns file and line of the evaluation example with these texts, or the file alone."""
    data = config.data
    path, split = (data.eval_path, "test") if data.eval_path else (data.train_path, data.split)
    sources = parse(path, data.hub_config, split)
    for place, row in itertools.chain.from_iterable(map(read_source, sources)):
        # A tokenizer may normalise, and a cut text keeps its beginning.
        text = unicodedata.normalize("NFC", format_row(row, "", rules).text)
        if text.startswith(prompt) and answer in text[len(prompt) :]:
            return place
    return path
