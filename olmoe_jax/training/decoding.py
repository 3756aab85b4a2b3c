"""Evaluation by decoding while a run trains: greedy answers to held-out prompts, exact match."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax import data
from olmoe_jax.config import Config
from olmoe_jax.errors import UserError
from olmoe_jax.generation.answers import Scorer, exact_match, scorer_for
from olmoe_jax.generation.decoding import generate
from olmoe_jax.model.parameters import ROUTER, Parameters, merge
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.training.setup import Datasets, Model, Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote for a prompt, what the data has, and whether they say the same."""

    prompt: str
    expected: str
    output: str
    right: bool


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A sample of the evaluation examples as texts, the longest prompt first.

    Attributes:
      tokenizer: the run's.
      texts: (prompt, expected answer) of each example.
      scorer: how an answer is compared.
      batch_size: prompts decoded together.
      max_new_tokens: of an answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    texts: list[tuple[str, str]]
    scorer: Scorer
    batch_size: int
    max_new_tokens: int

    def answers(self, program: Program, parameters: Parameters) -> list[Answer]:
        """Decodes with a run's model; under its mesh, and changes nothing of the run.

        Args:
          program: whose model it is, and its frozen parameters.
          parameters: what trains, as it is now.
        """
        dtype = program.trainer.settings.compute_dtype
        # As `from_pretrained` has them: read at every token, so cast them once.
        values = {
            name: value if name == ROUTER or isinstance(value, Quantized) else value.astype(dtype)
            for name, value in (parameters | program.frozen).items()
        }
        prompts = [prompt for prompt, _ in self.texts]
        devices = program.mesh.size
        size = -(-min(self.batch_size, len(prompts)) // devices) * devices
        filled = prompts + [prompts[-1]] * (-len(prompts) % size)
        outputs = generate(
            merge(program.trainer.graph, values),
            self.tokenizer,
            filled,
            max_new_tokens=self.max_new_tokens,
            batch_size=size,
        )
        return [
            Answer(prompt, expected, output, exact_match(self.scorer, output, expected))
            for (prompt, expected), output in zip(self.texts, outputs, strict=False)
        ]


def held_out_sample(config: Config, model: Model, datasets: Datasets) -> HeldOut | None:
    """The examples that the run decodes, chosen by train.seed; None: it decodes none.

    An example is its first prompt and the answer to it. Left out are those without a prompt, those
    whose end was cut, and those that do not fit the model's context.

    Raises:
      UserError: none is left.
    """
    options, evaluation = config.generate, datasets.evaluation
    if options.every is None:
        return None
    tokenizer = data.load_tokenizer(str(model.tokenizer_files))
    room = model.config.max_position_embeddings - options.max_new_tokens
    found: list[tuple[int, str, str]] = []
    for index in np.random.RandomState(config.train.seed).permutation(len(evaluation)):
        tokens, trained = evaluation.example(index)
        start = int(trained.argmax())
        end = start + int(np.append(~trained[start:], True).argmax())
        if 0 < start <= room and trained[start] and tokens[end - 1] == tokenizer.eos_token_id:
            prompt, expected = (
                tokenizer.decode(t) for t in (tokens[:start], tokens[start : end - 1])
            )
            found.append((start, prompt, expected))
        if len(found) == options.examples:
            break
    if not found:
        raise UserError(
            f"generate.every={options.every}: no evaluation example has a prompt of 1 to {room} "
            f"tokens and a whole answer ({model.config.max_position_embeddings} tokens of context "
            f"less generate.max_new_tokens={options.max_new_tokens}); write a smaller "
            "generate.max_new_tokens, or none"
        )
    # Like lengths share a batch: few programs are compiled.
    texts = [(prompt, expected) for _, prompt, expected in sorted(found, key=lambda f: -f[0])]
    scorer = options.scorer or scorer_for([expected for _, expected in texts])
    return HeldOut(tokenizer, texts, scorer, options.batch_size, options.max_new_tokens)
