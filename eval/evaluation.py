"""The evaluation of a task: prompts -> predictions on disk -> scores.

OUTPUT/model.json              the model and how it computes
OUTPUT/TASK/settings.json      what was asked (`settings_of`)
OUTPUT/TASK/predictions.jsonl  the model's texts, in the order of decoding
OUTPUT/TASK/rows.jsonl         in the data's order: prompt, text, the answer in the text, scores
OUTPUT/TASK/result.json        the metrics with their intervals
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.backends import Backend, Sampling
from eval.predictions import Output, PredictionFile
from eval.tasks.task import Example, Prediction, Scores, Task, Tools
from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json
from olmoe_jax.generation.stop_strings import cut_at

MODEL, SETTINGS, PREDICTIONS = "model.json", "settings.json", "predictions.jsonl"
ROWS, RESULT = "rows.jsonl", "result.json"


@dataclass(frozen=True)
class Decoding:
    """How all tasks are decoded. None takes each task's own value."""

    batch_size: int = 16
    max_new_tokens: int | None = None
    samples: int = 1  # of a row of the tasks with `sampled`; the others have one
    temperature: float | None = None
    seed: int = 0
    allow_extrapolation: bool = False
    top_p: float | None = None
    top_k: int | None = None
    decode_dtype: str | None = None
    chat_template: str | None = None  # its hash; None: prompts are no user turns


def settings_of(
    task: Task, examples: Sequence[Example], decoding: Decoding, limit: int | None
) -> dict[str, Any]:
    """Returns what a task's predictions depend on besides the model.

    "data" is the hash of these examples. `eval.run` puts that of our own examples in its place, so
    that the same rows have the same hash with every protocol.
    """
    return {
        "task": task.name,
        "protocol": task.protocol,
        "examples": len(examples),
        "limit": limit,
        "data": digest(examples),
        "max_new_tokens": decoding.max_new_tokens or task.max_new_tokens,
        "samples": decoding.samples if task.sampled else 1,
        **{
            name: getattr(task if getattr(decoding, name) is None else decoding, name)
            for name in ("temperature", "top_p", "top_k")
        },
        "decode_dtype": decoding.decode_dtype or task.dtype,
        "seed": decoding.seed,
        "batch_size": decoding.batch_size,
        # Results of before have neither.
        **({"allow_extrapolation": True} if decoding.allow_extrapolation else {}),
        **({"chat_template": decoding.chat_template} if decoding.chat_template else {}),
    }


def digest(examples: Sequence[Example]) -> str:
    """Returns a hash of examples, the same for the same rows."""
    content = json.dumps([[e.id, e.prompt, e.reference] for e in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def evaluate(
    task: Task,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    output: Path,
    backend: Callable[[], Backend],
    tools: Tools,
) -> dict[str, Any]:
    """Decodes what is not on disk yet, scores all predictions and writes the results.

    Args:
      task: the task.
      examples: all examples of the task that count.
      settings: from `settings_of`.
      output: the evaluation's directory.
      backend: loads the model; called only when something is left to decode.
      tools: tools of the scorers.

    Returns:
      The content of result.json.
    """
    path = output / task.name
    outputs, shortened = _decode(task, examples, settings, path / PREDICTIONS, backend)
    predictions = [
        Prediction(example, text, task.answer(text))
        for index, example in enumerate(examples)
        for sample in range(settings["samples"])
        for text in [outputs[index, sample]]
    ]
    scores = task.score(predictions, tools)
    with directory.new_file(path / ROWS) as partial:
        _write_rows(partial, predictions, scores)
    result = {
        "model": read_json(dict[str, Any], output / MODEL),
        "settings": dict(settings),
        "metrics": {name: asdict(metric) for name, metric in scores.metrics.items()},
        "counts": {"shortened_prompts": shortened} | scores.counts,
    }
    directory.write_json(path / RESULT, result)
    return result


def _decode(
    task: Task,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    file: Path,
    backend: Callable[[], Backend],
) -> tuple[dict[tuple[int, int], str], int]:
    """Returns texts by (index of the example, sample), and the number of shortened prompts."""
    # Prompts of like length share a batch, the longest first: if memory is short, it shows at once.
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt))
    wanted = [(index, sample) for index in order for sample in range(settings["samples"])]
    size = settings["batch_size"]
    batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    with PredictionFile(file, [len(batch) for batch in batches]) as done:
        if done.batches < len(batches):
            model = backend()
            progress = tqdm(
                total=len(wanted), initial=len(done.rows), desc=task.name, unit="row", leave=False
            )
            for number, batch in enumerate(batches[done.batches :], done.batches):
                done.append(_decode_batch(task, examples, settings, model, batch, number))
                progress.update(len(batch))
            progress.close()
        texts = {}
        for line, ((index, sample), row) in enumerate(zip(wanted, done.rows, strict=True), 1):
            if (row.id, row.sample) != (examples[index].id, sample):
                raise UserError(
                    f"{file}: line {line} is sample {row.sample} of row {row.id}, not {sample} of "
                    f"{examples[index].id}; remove the file, and the task is decoded again"
                )
            texts[index, sample] = row.output
        return texts, sum(row.shortened for row in done.rows if row.sample == 0)


def _decode_batch(
    task: Task,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    model: Backend,
    batch: Sequence[tuple[int, int]],
    number: int,
) -> list[Output]:
    """Returns the lines of predictions.jsonl for batch `number` of (example, sample) pairs."""
    limit = settings["max_new_tokens"]
    prompts = [examples[index].prompt for index, _ in batch]
    if not settings.get("allow_extrapolation"):
        prompts = [_fitting(task, examples[index], model, limit) for index, _ in batch]
    # Batches must not draw the same numbers.
    seed = settings["seed"] * 1_000_003 + number
    draws = {name: settings[name] for name in ("temperature", "top_p", "top_k")}
    texts = model.generate(prompts, Sampling(limit, seed=seed, stop=task.stop, **draws))
    return [
        Output(
            examples[index].id,
            sample,
            shortened=prompt != examples[index].prompt,
            output=cut_at(text, task.stop),
        )
        for (index, sample), prompt, text in zip(batch, prompts, texts, strict=True)
    ]


def _fitting(task: Task, example: Example, model: Backend, max_new_tokens: int) -> str:
    """Returns the prompt, shortened until it fits the model's context with its continuation."""
    prompt, room = example.prompt, model.context - max_new_tokens
    while (length := len(model.encode(prompt))) > room:
        shorter = task.shorten(prompt)
        if shorter is None:
            raise UserError(
                f"{task.name}: the prompt of row {example.id} has {length} tokens, and the model's "
                f"context of {model.context} leaves {max(0, room)} beside {max_new_tokens} new "
                "tokens; write a smaller --max_new_tokens, or --allow_extrapolation"
            )
        prompt = shorter
    return prompt


def _write_rows(file: Path, predictions: Sequence[Prediction], scores: Scores) -> None:
    # A model may write half a surrogate pair as a JSON escape, which no UTF-8 can hold.
    with open(file, "w", encoding="utf-8", errors="replace") as opened:
        for prediction, row in zip(predictions, scores.rows, strict=True):
            line = {
                "id": prediction.example.id,
                "prompt": prediction.example.prompt,
                "output": prediction.output,
                "answer": prediction.answer,
                "reference": prediction.example.reference,
            }
            opened.write(json.dumps(line | row, ensure_ascii=False) + "\n")
