"""The model of lm_eval, which pyproject.toml's entry point names `olmoe_jax`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from eval.backends import DTYPES, Sampling, check_backend
from eval.backends.jax import JaxBackend
from olmoe_jax.errors import UserError
from olmoe_jax.generation.likelihood import TokenPair


class OlmoeLM(TemplateLM):
    """Answers lm_eval's three kinds of requests with a model.

    Nothing is put in front of a text, as in this project's own tasks. Only a text without a context
    follows the tokenizer's bos token, or eos where the tokenizer has no bos.

    Args (lm_eval's names, --model_args):
      pretrained: a hub id, a Hugging Face directory, a training run or a converted checkpoint.
      peft: a PEFT adapter of that model, or the LoRA run that made it.
      dtype: in which the model computes.
      batch_size: requests that are answered together.
      max_batch_size, device: lm_eval's flags, ignored: jax takes all devices.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ):
        super().__init__()
        if unknown:
            raise UserError(
                f"--model_args {min(unknown)}=: there is no such argument; write some of "
                "pretrained, peft, dtype"
            )
        if pretrained is None:
            raise UserError(
                "--model_args pretrained= is missing; write a model's directory or hub id"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: write a number, 1 or more")
        if dtype not in DTYPES:
            raise UserError(f"--model_args dtype={dtype}: write one of {', '.join(DTYPES)}")
        check_backend("jax", pretrained, peft)
        self._backend = JaxBackend(pretrained, dtype, peft)
        self._batch_size = int(batch_size)
        self.tokenizer, self.max_length = self._backend.tokenizer, self._backend.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Returns the text's tokens, without special tokens."""
        return self._backend.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, greedy) of each (text, context, continuation) request.

        A context that is too long loses its start. A request without text is a part of a rolling
        window and is not cached.
        """
        # The longest first: if memory is short, it shows at once. Equal contexts stand together.
        collator = Collator(requests, lambda request: (-len(request[1] + request[2]), *request[1:]))
        found = []
        for batch in self._batches(collator, "log-likelihoods", disable_tqdm):
            answers = self._backend.log_likelihoods([self._fitting(*pair) for _, *pair in batch])
            for (text, *_), answer in zip(batch, answers, strict=True):
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            found += answers
        return collator.get_original(found)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each whole text."""
        texts, found = [request.args[0] for request in requests], []
        # Some texts at a time: their windows fill batches, and the cache has them soon.
        for start in tqdm(range(0, len(texts), self._batch_size), disable=disable_tqdm):
            some = texts[start : start + self._batch_size]
            windows = [self._windows(text) for text in some]
            pairs = [(None, *pair) for of_text in windows for pair in of_text]
            scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm=True))
            for text, of_text in zip(some, windows, strict=True):
                found.append(sum(next(scores)[0] for _ in of_text))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each (prompt, options) request."""
        collator = Collator(
            [request.args for request in requests],
            lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
        )
        found = []
        batches = self._batches(collator, "texts", disable_tqdm)
        for number, batch in enumerate(batches):
            # Batches must not draw the same numbers.
            sampling = sampling_of(batch[0][1], seed=number)
            prompts = [self._fitting_prompt(text, sampling.max_new_tokens) for text, _ in batch]
            texts = self._backend.generate(prompts, sampling)
            for request, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request, text)
            found += texts
        return collator.get_original(found)

    def _windows(self, text: str) -> list[TokenPair]:
        """Returns pairs that predict each token of the text once, with as much context as fits."""
        windows = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return list(map(make_disjoint_window, windows))

    def _batches(self, collator: Collator, what: str, disable_tqdm: bool) -> Iterator[list]:
        with tqdm(total=len(collator), desc=what, disable=disable_tqdm) as bar:
            for batch in collator.get_batched(n=self._batch_size):
                yield batch
                bar.update(len(batch))

    def _fitting(self, context: list[int], continuation: list[int]) -> TokenPair:
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task asks for the probability of {len(continuation)} tokens, and the model's "
                f"context is {self.max_length}; leave the task out"
            )
        return maybe_truncate(context, len(continuation) - 1, self.max_length)[0], continuation

    def _fitting_prompt(self, prompt: str, max_new_tokens: int) -> str:
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"a task asks for {max_new_tokens} new tokens, and the model's context is "
                f"{self.max_length}; write a smaller --gen_kwargs max_gen_toks=N"
            )
        tokens = self.tok_encode(prompt)
        kept, _ = maybe_truncate(tokens, max_new_tokens, self.max_length)
        if len(kept) < len(tokens):
            prompt = self.tokenizer.decode(kept)
            # A text that begins within a character or a word may have more tokens than `kept`.
            while len(self.tok_encode(prompt)) > len(kept):
                prompt = prompt[1:]
        return prompt


def sampling_of(options: Mapping[str, Any], seed: int = 0) -> Sampling:
    """Returns lm_eval's options of a generation in the terms of the backends.

    Raises:
      UserError: an option asks for what the decoder does not do.
    """
    rest = dict(normalize_gen_kwargs(dict(options)))
    limit, temperature = rest.pop("max_gen_toks"), rest.pop("temperature", 0.0)
    top_p, top_k = rest.pop("top_p", None) or 1.0, max(0, rest.pop("top_k", None) or 0)
    stop = tuple(text for text in rest.pop("until") if text)
    del rest["do_sample"]
    for name, value in rest.items():
        if (name, value) != ("num_beams", 1):
            raise UserError(
                f"a task decodes with {name}={value}, which is not supported; leave the task out"
            )
    return Sampling(limit, temperature, seed, stop, top_p, top_k)
