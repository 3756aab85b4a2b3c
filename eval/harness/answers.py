"""Answers to the three kinds of requests of lm-evaluation-harness, on disk before they count.

TASK/loglikelihood.jsonl, loglikelihood_rolling.jsonl, generate_until.jsonl: a line per answer, in
the order in which they were computed.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.backends import Prompts, Sampling
from eval.backends.jax import JaxBackend
from eval.predictions import PredictionFile
from olmoe_jax.errors import UserError
from olmoe_jax.generation.likelihood import Pair, rolling_windows

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MAX_NEW_TOKENS = 256
_NEUTRAL = {"num_beams": 1, "top_p": 1, "top_k": 0}
"""What a request may say besides, since it changes nothing."""


class Answers:
    """A model's answers to the requests of one task; each method is called once.

    Args:
      path: the task's directory, where they are stored.
      prompts: the tokenizer.
      context: tokens that the model reads at most.
      backend: loads the model; called only when an answer is missing.
      batch_size: requests answered together.
      seed: of samples.
    """

    def __init__(
        self,
        path: Path,
        prompts: Prompts,
        context: int,
        backend: Callable[[], JaxBackend],
        batch_size: int,
        seed: int = 0,
    ):
        self.path, self.prompts, self.context = path, prompts, context
        self._backend, self._batch_size, self._seed = backend, batch_size, seed
        self.shortened = 0
        """Contexts whose beginning did not fit."""

    def log_likelihoods(
        self, pairs: Sequence[Pair], name: str = "loglikelihood"
    ) -> list[tuple[float, bool]]:
        """See `log_likelihoods`; too long a context loses its start."""
        fitting = [self._fitting(context, continuation) for context, continuation in pairs]

        # The longest first: if memory is short, it shows at once. Beside each other: equal ones.
        def place(index: int):
            tokens = [*fitting[index][0], *fitting[index][1]]
            return -len(tokens), tokens

        def answer(number: int, batch: Sequence[int]) -> list:
            return self._backend().log_likelihoods([fitting[index] for index in batch])

        found = self._answered(name, fitting, [sorted(range(len(pairs)), key=place)], answer)
        return [(value, greedy) for value, greedy in found]

    def rolling_log_likelihoods(self, texts: Sequence[Sequence[int]], prefix: int) -> list[float]:
        """The log-likelihoods of whole texts (tokens) after the token `prefix`."""
        windows = [list(rolling_windows(tokens, prefix, self.context)) for tokens in texts]
        pairs = [pair for of_text in windows for pair in of_text]
        scores = iter(self.log_likelihoods(pairs, "loglikelihood_rolling"))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuations of (prompt, options) requests; the options are lm_eval's."""
        asked = [
            (self._fitting_prompt(prompt, sampling.max_new_tokens), sampling)
            for prompt, options in requests
            for sampling in [sampling_of(options)]
        ]
        kinds: dict[Sampling, list[int]] = {}
        for index, (_, sampling) in enumerate(asked):
            kinds.setdefault(sampling, []).append(index)
        groups = [sorted(kind, key=lambda index: -len(asked[index][0])) for kind in kinds.values()]

        def answer(number: int, batch: Sequence[int]) -> list[str]:
            prompts, (sampling, *_) = zip(*(asked[index] for index in batch), strict=True)
            # Batches must not draw the same numbers.
            seed = self._seed * 1_000_003 + number
            limit, temperature, stop = sampling.max_new_tokens, sampling.temperature, sampling.stop
            return self._backend().generate(prompts, Sampling(limit, temperature, seed, stop))

        return self._answered("generate_until", requests, groups, answer)

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        room = self.context + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"{self.path.name}: asks for the probability of {len(continuation)} tokens, "
                f"and the model's context is {self.context}; leave the task out"
            )
        self.shortened += len(context) > room
        return context[-room:], continuation

    def _fitting_prompt(self, prompt: str, max_new_tokens: int) -> str:
        tokens, room = self.prompts.encode(prompt), self.context - max_new_tokens
        if room < 1:
            raise UserError(
                f"{self.path.name}: asks for {max_new_tokens} new tokens, and the model's context "
                f"is {self.context}; leave the task out"
            )
        if len(tokens) <= room:
            return prompt
        self.shortened += 1
        return self.prompts.tokenizer.decode(tokens[-room:])

    def _answered(
        self,
        name: str,
        requests: Sequence[Any],
        groups: Sequence[Sequence[int]],
        answer: Callable[[int, Sequence[int]], list],
    ) -> list:
        """Answers by request; `groups` of their indices are cut into batches."""
        size = self._batch_size
        batches = [
            group[start : start + size] for group in groups for start in range(0, len(group), size)
        ]
        order = list(itertools.chain(*batches))
        digests = [_digest(request) for request in requests]
        file = self.path / f"{name}.jsonl"
        with PredictionFile(file, [len(batch) for batch in batches]) as done:
            if any(
                row["request"] != digests[index]
                for index, row in zip(order, done.rows, strict=False)
            ):
                raise UserError(
                    f"{file}: holds answers to other requests, the task or its data has changed; "
                    "write another --output"
                )
            bar = tqdm(total=len(order), initial=len(done.rows), desc=self.path.name, leave=False)
            for number, batch in enumerate(batches[done.batches :], done.batches):
                answers = answer(number, batch)
                done.append(
                    [
                        {"request": digests[index], "answer": value}
                        for index, value in zip(batch, answers, strict=True)
                    ]
                )
                bar.update(len(batch))
            bar.close()
            by_index = dict(zip(order, (row["answer"] for row in done.rows), strict=True))
        return [by_index[index] for index in range(len(requests))]


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """lm_eval's options of a generation, in our terms.

    Raises:
      UserError: it asks for what our decoder does not do.
    """
    rest = dict(options)
    limits = [rest.pop(name) for name in _LIMITS if name in rest]
    stop = rest.pop("until", None) or []
    stop = [stop] if isinstance(stop, str) else stop
    # As lm_eval has it: a temperature counts only beside do_sample.
    drawn, temperature = rest.pop("do_sample", False), float(rest.pop("temperature", 0))
    for name, value in rest.items():
        if _NEUTRAL.get(name) != value:
            raise UserError(
                f"the task decodes with {name}={value}, which is not supported; leave the task out"
            )
    return Sampling(
        int(limits[0]) if limits else _MAX_NEW_TOKENS,
        temperature if drawn else 0.0,
        0,
        tuple(text for text in stop if text),
    )


def _digest(request: Any) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
