"""The judge: concurrent requests, each answered once and kept on disk."""

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
from tqdm import tqdm

from eval.judge.client import Answer, RequestError, Server, run
from eval.judge.prompts import Questions
from eval.tasks.task import Prediction
from olmoe_jax import files
from olmoe_jax.errors import UserError

_ANSWER_TOKENS = 150
"""Tokens that a judge writes for a request, for the estimate."""
_REASONS = 3
"""Reasons of failed requests that are said, the most frequent first."""
_BEGINNING = b'{"request": "'
"""The beginning of each line of the cache."""


@pydantic.with_config(files.STRICT)
@dataclass(frozen=True)
class _Entry(Answer):
    request: str


class AnswerCache:
    """Answers by the hash of their request, appended to a .jsonl file as they arrive.

    A line that a crash cut off is dropped, and the request is sent again.

    Raises:
      UserError: the file is damaged, or cannot be read and written.
    """

    def __init__(self, path: Path):
        self._path = path
        content = files.read_bytes(path, 1 << 30) if os.path.lexists(path) else b""
        *lines, cut = content.split(b"\n")
        if not cut.startswith(_BEGINNING[: len(cut)]):
            lines.append(cut)
        try:
            entries = [
                files.decode(_Entry, line, f"{path}: line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
        except UserError as error:
            raise UserError(f"{error}; remove the line, and its request is sent again") from None
        self._answers: dict[str, Answer] = {entry.request: entry for entry in entries}
        with files.os_errors(path, "write"), open(path, "ab") as file:
            file.truncate(content.rfind(b"\n") + 1)

    def get(self, request: str) -> Answer | None:
        """Returns the answer, or None if there is none."""
        return self._answers.get(request)

    def put(self, request: str, answer: Answer) -> None:
        """Keeps an answer, which is on disk on return."""
        line = json.dumps({"request": request} | asdict(answer), ensure_ascii=False) + "\n"
        with open(self._path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._answers[request] = answer


class Judge:
    """Scores of a task's predictions, from the judge's server and the file `cache` of its answers.

    At most `workers` requests are under way at a time.
    """

    def __init__(self, server: Server, questions: Questions, cache: Path, workers: int = 8):
        self._server, self._questions, self._workers = server, questions, workers
        self._cache = AnswerCache(cache)

    def __call__(
        self, task: str, predictions: Sequence[Prediction]
    ) -> tuple[list[float | None], dict[str, Any]]:
        """Returns the score of each prediction, 0 to 1 or None, and counts to report.

        Raises:
          UserError: the server cannot be reached, or refuses every request.
        """
        model, questions = self._server.model, self._questions
        bodies = [questions.body(model, questions.question(task, p)) for p in predictions]
        keys = [self._key(body) for body in bodies]
        missing = {
            key: body
            for key, body in zip(keys, bodies, strict=True)
            if self._cache.get(key) is None
        }
        print(self._estimate(task, missing, len(set(keys))))
        failures = run(self._ask_all(task, missing)) if missing else {}
        entries = [self._cache.get(key) for key in keys]
        scores = [questions.score(task, entry.answer) if entry else None for entry in entries]
        unparsable = sum(
            score is None and entry is not None
            for score, entry in zip(scores, entries, strict=True)
        )
        unanswered = sum(entry is None for entry in entries)
        without = questions.without_total
        counted = "have no score" if without is None else f"count {without:g}"
        for name, count in (("unparsable", unparsable), ("unanswered", unanswered)):
            if count:
                print(f"judge: {task}: {count} of {len(keys)} rows {counted}: {name}")
        scores = [without if score is None else score for score in scores]
        # In the order of the requests: which of them failed first is chance.
        reasons = Counter(failures[key] for key in missing if key in failures)
        for reason, count in reasons.most_common(_REASONS):
            print(f"judge: {task}: {count} requests failed: {reason}")
        if len(reasons) > _REASONS:
            others = sum(count for _, count in reasons.most_common()[_REASONS:])
            print(f"judge: {task}: {others} requests failed for other reasons")
        if unanswered:
            print("judge: the same command sends the failed requests again")
        return scores, {
            "judge_model": self._server.model,
            "judge_unparsable": unparsable,
            "judge_unanswered": unanswered,
            **questions.facts,
        }

    def _key(self, body: Mapping[str, Any]) -> str:
        content = json.dumps([self._server.url.rstrip("/"), body], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _estimate(self, task: str, missing: Mapping[str, Any], requests: int) -> str:
        prompts = [message["content"] for body in missing.values() for message in body["messages"]]
        return (
            f"judge: {task}: {len(missing)} requests to {self._server.model} at "
            f"{self._server.url} ({requests - len(missing)} answered before), about "
            f"{sum(map(estimated_tokens, prompts)):,} tokens to read and "
            f"{_ANSWER_TOKENS * len(missing):,} to write"
        )

    async def _ask_all(self, task: str, missing: Mapping[str, Any]) -> dict[str, str]:
        """Fills the cache. Returns why requests failed, by their key."""
        failures, left = {}, iter(missing.items())

        async def work() -> None:
            for key, body in left:
                try:
                    self._cache.put(key, await self._server.ask(client, body))
                except RequestError as error:
                    failures[key] = str(error)
                bar.update()

        async with self._server.client() as client:
            await self._server.find(client)
            with tqdm(desc=f"judge {task}", total=len(missing), leave=False) as bar:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self._workers, len(missing))):
                            group.create_task(work())
                except ExceptionGroup as errors:  # the first ended the others
                    raise errors.exceptions[0] from None
        return failures


def estimated_tokens(text: str) -> int:
    """Estimates the tokens of a text: four ASCII letters each, or one other character."""
    ascii_letters = sum(character.isascii() for character in text)
    return ascii_letters // 4 + len(text) - ascii_letters
