"""Requests to an OpenAI-compatible server: /chat/completions, with retries, standard library only.

The key travels in one header of the request. No message of ours shows the key: it is blacked out in
whatever a server says.
"""

import http.client
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olmoe_jax.errors import UserError

_RETRIED = {408, 409, 425, 429}
_HOPELESS = {401, 403, 404, 405}
"""Statuses that the next request would get too."""


class RequestError(Exception):
    """Raised for a request that stays without an answer, after the retries that could help."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirect, which would carry the key to another server."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Server:
    """The judge's server.

    Args:
      url: without /chat/completions.
      model: the judge's name on the server.
      key: for the Authorization header; empty: no header.
      timeout: seconds for a response.
      attempts: how often a request is sent at most.
      first_wait: seconds before the second attempt; doubles from attempt to attempt.
      longest_wait: seconds that a wait lasts at most, even if the server asks for more.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 120.0
    attempts: int = 7
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--judge_url {self.url}: write http://… or https://…, ending in /v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "--judge_url: leave user, password and parameters out; the key is read from the "
                "environment variable JUDGE_API_KEY"
            )
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError("JUDGE_API_KEY: has characters that no key has; set it again")

    def __repr__(self) -> str:
        return f"Server({self.url}, {self.model})"

    def ask(self, body: Mapping[str, Any], stopped: threading.Event) -> dict[str, Any]:
        """Returns the server's answer: {"answer", "prompt_tokens", "completion_tokens"}.

        Raises:
          RequestError: every attempt failed, this request was refused, or `stopped` was set.
          UserError: the server refuses every request.
        """
        reason = "not asked"
        for attempt in range(self.attempts):
            wait = 0.0
            try:
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                reason = self._describe(error)
                if error.code in _HOPELESS:
                    raise UserError(
                        f"the judge at {self.url} says {reason}; check --judge_url, --judge_model "
                        "and the environment variable JUDGE_API_KEY"
                    ) from None
                if error.code not in _RETRIED and error.code < 500:
                    raise RequestError(reason) from None
                wait = _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                # A time-out, a disconnect, or an answer that is no chat completion.
                reason = self._redacted(f"{type(error).__name__}: {error}")
            if attempt + 1 < self.attempts:
                # A random part: requests that failed together do not return together.
                backoff = self.first_wait * 2**attempt * random.uniform(0.5, 1.0)
                if stopped.wait(min(max(wait, backoff), self.longest_wait)):
                    raise RequestError("interrupted")
        raise RequestError(f"{reason} ({self.attempts} attempts)")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()

    def _describe(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return self._redacted(f"{error.code} {error.reason}: {' '.join(text.split())}")[:300]

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _content(response: bytes) -> dict[str, Any]:
    """Returns the text and the usage; raises ValueError for what is no chat completion."""
    try:
        value = json.loads(response)
        answer = value["choices"][0]["message"]["content"]
        usage = value.get("usage") or {}
        return {
            "answer": str(answer or ""),
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "completion_tokens": int(usage.get("completion_tokens") or 0),
        }
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__})") from None


def _retry_after(value: str | None) -> float:
    """Returns seconds, 0 if the server names none (the date form is rare; backoff will do)."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
