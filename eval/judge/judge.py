"""The judge: concurrent requests, each answered once and kept on disk."""

import concurrent.futures
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.judge.client import RequestError, Server
from eval.judge.prompts import judge_prompt, total_of
from eval.tasks.task import Prediction
from olmoe_jax.errors import UserError

_ANSWER_TOKENS = 150
"""Tokens that a judge writes for a request, for the estimate."""


class AnswerCache:
    """Answers by the hash of their request, appended to a .jsonl file as they arrive.

    A line that a crash cut off is dropped, and the request is sent again.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        try:
            with open(path, "a+b") as file:
                file.seek(0)
                content = file.read()
                whole = content.rfind(b"\n") + 1
                file.truncate(whole)
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror})") from None
        entries = map(json.loads, content[:whole].splitlines())
        self._answers = {entry["request"]: entry for entry in entries}

    def get(self, request: str) -> dict[str, Any] | None:
        """Returns the answer, or None if there is none."""
        return self._answers.get(request)

    def put(self, request: str, entry: Mapping[str, Any]) -> None:
        """Keeps an answer, which is on disk on return."""
        entry = {"request": request, **entry}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self._lock, open(self._path, "ab") as file:
            # A server may answer with half a surrogate pair, whose escape is JSON.
            file.write(line.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            self._answers[request] = entry


class Judge:
    """Scores of a task's predictions, from the judge's server and the file of earlier answers.

    Args:
      server: the judge's server.
      cache: the file of answers.
      workers: requests at a time.
      say: prints a line for the user.
    """

    def __init__(
        self, server: Server, cache: Path, workers: int = 8, say: Callable[[str], None] = print
    ):
        self._server, self._workers, self._say = server, workers, say
        self._cache = AnswerCache(cache)

    def __call__(
        self, task: str, predictions: Sequence[Prediction]
    ) -> tuple[list[float | None], dict[str, Any]]:
        """Returns the score of each prediction, 0 to 1 or None, and counts to report.

        Raises:
          UserError: the server refuses every request.
        """
        bodies = [self._body(judge_prompt(task, prediction)) for prediction in predictions]
        keys = [self._key(body) for body in bodies]
        missing = {
            key: body
            for key, body in zip(keys, bodies, strict=True)
            if self._cache.get(key) is None
        }
        self._say(self._estimate(task, missing, len(set(keys))))
        failures = self._ask_all(task, missing)
        entries = [self._cache.get(key) for key in keys]
        scores = [total_of(entry["answer"]) if entry else None for entry in entries]
        unparsable = sum(
            score is None and entry is not None
            for score, entry in zip(scores, entries, strict=True)
        )
        unanswered = sum(entry is None for entry in entries)
        for name, count in (("unparsable", unparsable), ("unanswered", unanswered)):
            if count:
                self._say(f"judge: {task}: {count} of {len(keys)} rows have no score: {name}")
        for reason, count in Counter(failures.values()).most_common(3):
            self._say(f"judge: {task}: {count} requests failed: {reason}")
        if unanswered:
            self._say("judge: the same command sends the failed requests again")
        return scores, {
            "judge_model": self._server.model,
            "judge_unparsable": unparsable,
            "judge_unanswered": unanswered,
        }

    def _body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self._server.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }

    def _key(self, body: Mapping[str, Any]) -> str:
        content = json.dumps([self._server.url.rstrip("/"), body], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _estimate(self, task: str, missing: Mapping[str, Any], requests: int) -> str:
        prompts = [body["messages"][0]["content"] for body in missing.values()]
        return (
            f"judge: {task}: {len(missing)} requests to {self._server.model} at "
            f"{self._server.url} ({requests - len(missing)} answered before), about "
            f"{sum(map(estimated_tokens, prompts)):,} tokens to read and "
            f"{_ANSWER_TOKENS * len(missing):,} to write"
        )

    def _ask_all(self, task: str, missing: Mapping[str, Any]) -> dict[str, str]:
        """Fills the cache. Returns why requests failed, by their key."""
        failures = {}
        stopped = threading.Event()

        def ask(key: str) -> None:
            if not stopped.is_set():
                self._cache.put(key, self._server.ask(missing[key], stopped))

        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(ask, key): key for key in missing}
            try:
                done = concurrent.futures.as_completed(futures)
                for future in tqdm(done, f"judge {task}", len(futures), leave=False):
                    try:
                        future.result()
                    except RequestError as error:
                        failures[futures[future]] = str(error)
            except BaseException:  # a refusal or Ctrl-C: let the waiting threads end
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures


def estimated_tokens(text: str) -> int:
    """Estimates the tokens of a text: four ASCII letters each, or one other character."""
    ascii_letters = sum(character.isascii() for character in text)
    return ascii_letters // 4 + len(text) - ascii_letters
