"""The judge's client against a server that wastes time, lies, and repeats the key."""

import asyncio
import base64
import gzip
import json
import re
import time
from urllib.parse import unquote

import pytest
from helpers import message_of
from judge_server import KEY, judge_server

from eval.judge.client import Answer, RequestError, Server, run
from eval.judge.prompts import OWN_QUESTIONS
from olmoe_jax.errors import UserError

OK = b"HTTP/1.1 200 OK\r\n"
CHAT = b'{"choices": [{"message": {"content": "Total: 1"}}], "usage": {"prompt_tokens": %s}}'


def goes_on(start: bytes, more: bytes, pause: float = 0.001):
    """Returns an action that writes `more` for ever."""

    def action(write):
        write(start)
        while True:
            write(more)
            time.sleep(pause)

    return action


def writes(*parts: bytes):
    """Returns an action that writes a response with this status line, headers and body."""
    return lambda write: write(b"".join(parts))


HOSTILE = {
    "silent": (lambda write: time.sleep(3), "within 2 s"),
    "header drips": (goes_on(OK + b"X: ", b"a", 0.02), "within 2 s"),
    "body drips": (goes_on(OK + b"Content-Length: 9999\r\n\r\n", b"[", 0.02), "within 2 s"),
    "chunks drip": (
        goes_on(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n", 0.02),
        "within 2 s",
    ),
    "endless 100": (goes_on(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999), "within 2 s"),
    "100 drips": (goes_on(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), "within 2 s"),
    "endless header": (goes_on(OK, b"X: y\r\n" * 999), "RemoteProtocolError"),
    "endless body": (goes_on(OK + b"\r\n", b" " * 65536), "more than 1 MiB"),
    "huge length": (
        goes_on(OK + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 12), b" " * 65536),
        "1 MiB",
    ),
    "huge chunk": (
        goes_on(OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % 10**12, b" " * 65536),
        "more than 1 MiB",
    ),
    "endless chunk size": (
        goes_on(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1" * 999),
        "RemoteProtocolError",
    ),
    "length is a lie": (
        writes(OK, b"Content-Length: 9999\r\n\r\n", CHAT % b"1"),
        "RemoteProtocolError",
    ),
    "bomb": (
        writes(OK, b"Content-Encoding: gzip\r\n\r\n", gzip.compress(CHAT % b"1" + b" " * 10**7)),
        "no chat completion",
    ),
    "no HTTP": (writes(b"SSH-2.0-OpenSSH\r\n"), "RemoteProtocolError"),
    "hangs up": (writes(), "RemoteProtocolError"),
    "deep": (writes(OK, b"\r\n", b"[" * 100_000), "no chat completion"),
    "digits": (writes(OK, b"\r\n", CHAT % (b"1" * 5000)), "no chat completion"),
    "infinite count": (writes(OK, b"\r\n", CHAT % b"1e999"), "no chat completion"),
    "NaN count": (writes(OK, b"\r\n", CHAT % b"NaN"), "no chat completion"),
    "negative count": (writes(OK, b"\r\n", CHAT % b"-1"), "no chat completion"),
    "count of another type": (writes(OK, b"\r\n", CHAT % b'["1"]'), "no chat completion"),
    "switches protocols": (writes(b"HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n"), "ProtocolError"),
    "redirects nowhere": (writes(b"HTTP/1.1 302 X\r\nLocation: http://[\r\n\r\n"), "302 X"),
    "control sequences": (writes(b"HTTP/1.1 400 X\r\n\r\n\x1b[2J\xe2\x80\xae"), r"\x1b[2J\u202e"),
}


def ask_all(server, names, **changes):
    """Returns the answer or the exception for each name, asked for at the same time."""
    settings = {"key": KEY, "timeout": 2, "attempts": 1} | changes
    judge = Server(server.url, "judge-model", **settings)

    async def ask(client, name):
        try:
            question = f"<candidate>\n{name}\n</candidate>"
            return await judge.ask(client, OWN_QUESTIONS.body(judge.model, question))
        except (RequestError, UserError) as error:
            return error

    async def ask_them():
        async with judge.client() as client:
            return await asyncio.gather(*(ask(client, name) for name in names))

    return dict(zip(names, run(ask_them()), strict=True))


def test_a_hostile_server_wastes_no_time():
    def play(name, number):
        return "Total: 1" if name == "fine" else HOSTILE[name][0]

    late = [name for name, (_, words) in HOSTILE.items() if words == "within 2 s"]
    others = [name for name in HOSTILE if name not in late]
    with judge_server(play) as server:
        start = time.monotonic()
        found = ask_all(server, late)
        assert time.monotonic() - start < 6
        # These end without a deadline, which would come first on a busy machine.
        found |= ask_all(server, [*others, "fine"], timeout=60)
    assert found.pop("fine") == Answer("Total: 1", 0, 0)
    for name, error in found.items():
        assert HOSTILE[name][1] in str(error), name
        assert str(error).isprintable()


def escaped(key: str, form: str) -> str:
    return "".join(form % ord(c) for c in key)


ECHOES = {
    "plain": f"no such key: {KEY}!",
    "other case": KEY.upper(),
    "JSON": escaped(KEY, r"\u%04x"),
    "JSON, upper case, twice": escaped(KEY, r"\\u%04X"),
    "JSON, in parts": KEY[:3] + escaped(KEY[3:7], r"\u%04x") + KEY[7:],
    "URL": escaped(KEY, "%%%02x"),
    "URL, twice": escaped(KEY, "%%25%02X"),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of the header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 of user and key": base64.b64encode(f"user:{KEY}:x".encode()).decode(),
    "cut by us": "x" * 270 + KEY * 9,
    "longer than we read": "x" * 16_370 + KEY,
    "spaces": " " * 16_370 + KEY * 9,
}


def play_echoes(name, number):
    kind, place = name.split("/")
    echo = ECHOES[kind].encode()
    return {
        "body": writes(b"HTTP/1.1 400 Bad Request\r\n\r\n", echo),
        "refusal": writes(b"HTTP/1.1 401 Unauthorized\r\n\r\n", echo),
        "reason": writes(b"HTTP/1.1 500 ", echo, b"\r\n\r\n"),
        "status line": writes(echo, b"\r\n\r\n"),
        "header": writes(OK, echo, b"\r\n\r\n"),
        "length": writes(OK, b"Content-Length: ", echo, b"\r\n\r\n"),
        "chunk size": writes(OK, b"Transfer-Encoding: chunked\r\n\r\n", echo, b"\r\n"),
        "location": writes(b"HTTP/1.1 302 X\r\nLocation: http://", echo, b":x/\r\n\r\n"),
        "type": writes(OK, b"\r\n", json.dumps({"choices": echo.decode()}).encode()),
        "answer": writes(
            OK, b"\r\n", json.dumps({"choices": [{"message": {"content": echo.decode()}}]}).encode()
        ),
    }[place]


@pytest.mark.parametrize("kind", ECHOES)
def test_no_output_shows_the_key(kind):
    places = ["body", "refusal", "reason", "status line", "header", "length", "chunk size"]
    names = [f"{kind}/{place}" for place in [*places, "location", "type", "answer"]]
    with judge_server(play_echoes) as server:
        found = ask_all(server, names, timeout=5)
    for name, shown in found.items():
        text = f"{shown} {shown!r}"
        for _ in range(3):
            parts = [KEY[i : i + 5] for i in range(len(KEY) - 4)]
            parts += [base64.b64encode(bytes(i) + KEY.encode()).decode()[4:-4] for i in range(3)]
            assert not any(part.lower() in text.lower() for part in parts), name
            text = re.sub(r"\\+u00(..)", lambda c: chr(int(c[1], 16)), unquote(text))
    assert isinstance(found[f"{kind}/answer"], Answer)
    assert "***" in str(found[f"{kind}/answer"])


@pytest.mark.parametrize(
    ("status", "words"), [(401, "says 401"), (404, "says 404"), (400, "answers no request: 400")]
)
def test_the_check_finds_a_wrong_key_or_model(status, words):
    with judge_server(lambda name, number: "") as server:
        server.probe = status
        body = OWN_QUESTIONS.body("judge-model", "Write yes.")
        message = message_of(Server(server.url, "judge-model", KEY).check, body)
        assert sum(server.asked.values()) == 1
    assert words in message
    assert "--judge_model" in message
    assert KEY not in message
