"""Requests to an OpenAI-compatible server: /chat/completions, with deadlines and retries.

The server is a stranger, whose answers may be late, endless or broken. A deadline covers a whole
attempt, whatever arrives meanwhile, and no attempt keeps more than 1 MiB.

The key travels in one header of the request. No text of the server leaves this file before the key
is blacked out in it.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import httpx2
import pydantic

from olmoe_jax import files
from olmoe_jax.errors import UserError, one_line, os_reason, shorten

T = TypeVar("T")

_RETRIED = {408, 409, 425, 429}
_HOPELESS = {401, 403, 404, 405}
"""Statuses that the next request would get too."""
_LARGEST = 1 << 20
"""Bytes of a response."""
_LARGEST_SHOWN = 1 << 14
"""Bytes of a refusal whose text is shown. The text of a larger one would end in a part of a key."""


class RequestError(Exception):
    """Raised for a request that stays without an answer, after the retries that could help."""


class _AttemptError(RequestError):
    """Raised for an attempt that another one may mend, `wait` seconds later at the earliest."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


Count = Annotated[int, pydantic.Field(ge=0, lt=2**31)]


@pydantic.with_config(files.STRICT)
@dataclass(frozen=True)
class Answer:
    """The judge's text, and the tokens that the server counted."""

    answer: str
    prompt_tokens: Count
    completion_tokens: Count


@dataclass(frozen=True)
class _Usage:
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


_TEXT = pydantic.AliasPath("choices", 0, "message", "content")


@pydantic.with_config(files.STRICT)
@dataclass(frozen=True)
class _Completion:
    text: Annotated[str | None, pydantic.Field(validation_alias=_TEXT)]
    usage: _Usage | None = None


@dataclass(frozen=True)
class Server:
    """The judge's server.

    Args:
      url: without /chat/completions.
      model: the judge's name on the server.
      key: for the Authorization header; empty: no header.
      reach: seconds within which a server that is there responds to anything.
      timeout: seconds for an attempt: name, connection, request and whole response.
      patience: seconds for a request, with all attempts and waits.
      attempts: how often a request is sent at most.
      first_wait: seconds before the second attempt; doubles from attempt to attempt.
      longest_wait: seconds that a wait lasts at most, even if the server asks for more.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    reach: float = 3.0
    timeout: float = 120.0
    patience: float = 300.0
    attempts: int = 7
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self):
        try:
            url = httpx2.URL(self.url)
        except (httpx2.InvalidURL, ValueError):
            url = httpx2.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError("--judge_url: no such URL; write http://… or https://…, ending in /v1")
        if url.userinfo or url.query or url.fragment:
            raise UserError(
                "--judge_url: leave user, password and parameters out; the key is read from the "
                "environment variable JUDGE_API_KEY"
            )
        if not re.fullmatch(r"[!-~]*", self.key):
            raise UserError("JUDGE_API_KEY: has characters that no key has; set it again")

    def client(self) -> httpx2.AsyncClient:
        """Returns the client for `ask`: an async context manager that follows no redirect.

        Raises:
          UserError: the environment names a proxy or certificates that do not work.
        """
        # A compressed answer could unpack to any size.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            # The deadlines are ours: the client's own begin anew with every byte.
            return httpx2.AsyncClient(headers=headers, timeout=None, limits=httpx2.Limits())
        except (httpx2.InvalidURL, ImportError, OSError, ValueError) as error:
            reason = f"{error}; check the environment's proxies and SSL_CERT_FILE"
            raise UserError(f"--judge_url: {reason}") from None

    def check(self, body: Mapping[str, Any]) -> None:
        """Makes sure that the server is there and answers a request.

        Raises:
          UserError: the server does not.
        """
        run(self._check(body))

    async def _check(self, body: Mapping[str, Any]) -> None:
        async with self.client() as client:
            await self.find(client)
            try:
                quick = dataclasses.replace(self, patience=self.timeout)
                await quick.ask(client, body)
            except RequestError as error:
                raise self._unusable(f"answers no request: {error}") from None

    async def find(self, client: httpx2.AsyncClient) -> None:
        """Makes sure that the server responds within `reach` seconds, whatever it responds.

        Raises:
          UserError: the server does not.
        """
        try:
            async with self._response(client, self.reach, "GET", "models"):
                pass
        except RequestError as error:
            reason = f"cannot be reached: {error}; start it, or check --judge_url"
            raise UserError(f"the judge at {self.url} {reason}") from None

    async def ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Answer:
        """Returns the server's answer to a request.

        Raises:
          RequestError: every attempt failed, or this request was refused.
          UserError: the server refuses every request, or is no longer there.
        """
        content, last = json.dumps(body).encode(), ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience):
                for attempt in range(self.attempts):
                    try:
                        return await self._attempt(client, content)
                    except _AttemptError as error:
                        last, wait = f"{error} ({attempt + 1} attempts)", error.wait
                    if attempt + 1 < self.attempts:
                        # A random part: requests that failed together do not return together.
                        backoff = self.first_wait * 2**attempt * random.uniform(0.5, 1.0)
                        await asyncio.sleep(min(max(wait, backoff), self.longest_wait))
        await self.find(client)
        raise RequestError(last or f"no answer within {self.patience:g} s")

    async def _attempt(self, client: httpx2.AsyncClient, content: bytes) -> Answer:
        async with self._response(
            client, self.timeout, "POST", "chat/completions", content
        ) as response:
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > _LARGEST:
                    raise _AttemptError(f"an answer of more than {_LARGEST >> 20} MiB")
        status = response.status_code
        if response.is_success:
            return self._answer(bytes(received))
        text = received.decode(errors="replace") if len(received) <= _LARGEST_SHOWN else ""
        reason = f"{status} {response.reason_phrase}: {text}"
        reason = shorten(self._redacted(one_line(reason)), 300)
        if status in _HOPELESS:
            raise self._unusable(f"says {reason}")
        if status in _RETRIED or status >= 500:
            raise _AttemptError(reason, _seconds(response.headers.get("Retry-After")))
        raise RequestError(reason)

    @contextlib.asynccontextmanager
    async def _response(
        self,
        client: httpx2.AsyncClient,
        seconds: float,
        method: str,
        path: str,
        content: bytes | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """Yields the response, whose body is not read yet; `seconds` include the block's.

        Raises:
          _AttemptError: there is none, or it breaks off.
        """
        url = f"{self.url.rstrip('/')}/{path}"
        try:
            async with (
                asyncio.timeout(seconds),
                client.stream(method, url, content=content) as response,
            ):
                yield response
        except TimeoutError:
            raise _AttemptError(f"no complete response within {seconds:g} s") from None
        except (httpx2.HTTPError, OSError, OverflowError, ValueError) as error:
            raise _AttemptError(f"no complete response ({_cause(error)})") from None

    def _answer(self, content: bytes) -> Answer:
        try:
            found = files.decode(_Completion, content, "")
        except UserError:
            # Its message shows a part of the content, which may be a part of the key.
            raise _AttemptError("no chat completion") from None
        text, usage = self._redacted(found.text or ""), found.usage or _Usage()
        return Answer(text, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def _unusable(self, what: str) -> UserError:
        check = "check --judge_url, --judge_model and the environment variable JUDGE_API_KEY"
        return UserError(f"the judge at {self.url} {what}; {check}")

    def _redacted(self, text: str) -> str:
        return self._key_pattern.sub("***", text) if self.key else text

    @functools.cached_property
    def _key_pattern(self) -> re.Pattern[str]:
        """The key, each character as it is or as JSON or URLs write it, or within base64."""
        letters = [
            rf"(?:\\{{0,8}}{re.escape(c)}|(?:\\{{1,8}}(?:u00|x)|%(?:25){{0,4}}){ord(c):02x})"
            for c in self.key
        ]
        # What stands beside the key shifts its base64 by up to two bytes, and changes the ends.
        shifted = [base64.b64encode(bytes(n) + self.key.encode()).decode() for n in range(3)]
        inner = [text[4 * (n > 0) : -4] for n, text in enumerate(shifted) if len(text) >= 16]
        inner = [re.sub("[+/]", "[+/_-]", text) for text in inner]
        return re.compile("|".join(["".join(letters), *inner]), re.IGNORECASE)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Returns what the coroutine returns; Ctrl-C interrupts it."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that looks names up in threads for which neither deadline nor exit waits."""

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
        found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        found.set_running_or_notify_cancel()  # so that a result after the deadline is no error

        def look_up() -> None:
            try:
                found.set_result(socket.getaddrinfo(host, port, **options))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=look_up, daemon=True).start()
        return await asyncio.wrap_future(found)


def _cause(error: BaseException) -> str:
    """Returns the system's reason. A protocol error, which quotes the server, is only named."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, ExceptionGroup):  # of several addresses
        error = error.exceptions[0]
    name = type(error).__name__
    return f"{name}: {os_reason(error)}" if isinstance(error, OSError) else name


def _seconds(value: str | None) -> float:
    """Returns seconds, 0 if the server names none (the date form is rare; backoff will do)."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
