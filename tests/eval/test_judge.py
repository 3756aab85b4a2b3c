"""The judge scores every row, or says why it does not, whatever the server does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from helpers import ROOT, assert_user_error, message_of, run_module
from judge_server import KEY, judge_server, make_judge, predictions

from eval.judge.client import Server
from eval.judge.judge import AnswerCache, estimated_tokens
from eval.judge.prompts import OWN_QUESTIONS
from eval.statistics import rouge_words
from eval.tasks.task import Example, Prediction
from olmoe_jax.generation.answers import last_number, parse_intent

FAULTS = {
    "fine": ["总分：7"],
    "slow": [1.3, "总分：6"],
    "busy": [429, 429, "总分：5"],
    "broken": [500, 503, "总分：4"],
    "no json": [b"<html>", "总分：3"],
    "other json": [b'{"choices": []}', b"[]", b"null", "总分：2"],
    "not text": [b"\xff\xfe", "总分：1"],
    "hangs up": [None, "总分：8.5"],
    "half a body": [-1, "总分：9"],
    "no total": ["我觉得很好。"],
    "half a character": ["\ud83d"] * 9,
    "never": [500] * 9,
    "refused": [400] * 9,
    "redirected": [302] * 9,
}
SCORES = {"fine": 0.7, "slow": 0.6, "busy": 0.5, "broken": 0.4, "no json": 0.3, "other json": 0.2}
SCORES |= {"not text": 0.1, "hangs up": 0.85, "half a body": 0.9}


def play_faults(candidate, number):
    return FAULTS[candidate][number]


def test_every_row_is_scored_or_reported(tmp_path, capsys):
    rows = predictions(*FAULTS, "fine", "no total")
    with judge_server(play_faults) as server:
        scores, counts = make_judge(server, tmp_path)("law", rows)
        assert server.keys == {f"Bearer {KEY}"}
        assert None not in server.asked
        assert server.asked["busy"] == 3
        assert server.asked["fine"] == 1  # two rows, the same question
        assert server.asked["never"] == 4
        assert server.asked["refused"] == server.asked["redirected"] == 1
        asked = server.asked.copy()

        # A second run asks only for what got no answer.
        again, counts_again = make_judge(server, tmp_path)("law", rows)
        more = {name for name in FAULTS if server.asked[name] > asked[name]}
        assert more == {"never", "half a character", "refused", "redirected"}
    expected = [SCORES.get(p.answer) for p in rows]
    assert scores == again == expected
    assert counts == counts_again
    assert counts["judge_unparsable"] == 2
    assert counts["judge_unanswered"] == 4
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"judge: law: 14 requests to judge-model at {server.url} (0 answered")
    assert any("2 of 16 rows have no score: unparsable" in line for line in said)
    failed = [line.split("failed")[1] for line in said if "requests failed" in line]
    reasons = [": no chat completion", ": 500 ", ": 400 ", " for other reasons"] * 2
    assert all(map(str.startswith, failed, reasons))
    assert len(failed) == len(reasons)
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert KEY not in written + "".join(said)
    assert "wrong key ***?" in "".join(said)


def test_a_name_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    message = message_of(Server("http://somewhere/v1", "m", reach=0.2).check, {})
    assert "cannot be reached: no complete response within 0.2 s" in message
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("silent", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_dead_judge_ends_the_command_before_it_decodes(silent, tmp_path, tiny_model, data_dir):
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1] if silent else 1}/v1"
        command = ["eval.run", "--model", tiny_model, "--data", data_dir, "--tasks", "law"]
        command += ["--output", out, "--judge_model", "m", "--judge_url", url]
        start = time.monotonic()
        assert_user_error(run_module(*command), url, "cannot be reached", "--judge_url")
        assert time.monotonic() - start < 10
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\xff\n", "line 1: not JSON"),
        (b"\x00\xff", "line 1: not JSON"),
        (b'{"answer": "", "prompt_tokens": 1, "completion_tokens": 1}\n', "request is missing"),
        (
            b'{"request": "x", "answer": 1, "prompt_tokens": 1, "completion_tokens": 1}\n',
            "answer is 1",
        ),
        (b"\n[]\n", "line 2: the content is []"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b"null\n", "line 1: the content is null"),
    ],
)
def test_a_damaged_cache(content, words, tmp_path):
    file = tmp_path / "judge.jsonl"
    file.write_bytes(content)
    message = message_of(AnswerCache, file)
    assert words in message
    assert "remove the line" in message
    assert file.read_bytes() == content


def test_a_cache_that_is_no_file(tmp_path):
    assert "a directory, not a file" in message_of(AnswerCache, tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO" in message_of(AnswerCache, tmp_path / "fifo")
    (tmp_path / "blank").write_bytes(b"\n \n")
    assert AnswerCache(tmp_path / "blank").get("x") is None


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 10**6,
        "total" + ":" * 10**6,
        "total:" + " " * 10**6 + "x",
        "total: " + "1" * 10**6 + "x",
        "total: 1" + " \n" * 500_000 + "x",
        "1," * 500_000,
        "-" * 10**6,
        "." * 10**6,
        '{"a":' * 200_000,
    ],
)
def test_texts_are_parsed_in_linear_time(text):
    start = time.monotonic()
    for parse in (partial(OWN_QUESTIONS.score, "law"), last_number, parse_intent, rouge_words):
        parse(text)
    assert time.monotonic() - start < 5


def test_a_refusal_of_the_key_ends_it_at_once(tmp_path):
    with judge_server(lambda candidate, number: 401) as server:
        judge = make_judge(server, tmp_path)
        message = message_of(judge, "law", predictions(*map(str, range(40))))
        assert sum(server.asked.values()) < 40
    assert "401" in message
    assert "JUDGE_API_KEY" in message
    assert KEY not in message


def test_no_server_and_torn_cache(tmp_path):
    file = tmp_path / "judge.jsonl"
    with judge_server(lambda candidate, number: "总分：10") as server:
        judge = make_judge(server, tmp_path)
        judge("law", predictions("a", "b"))
    content = file.read_bytes()
    make_judge(server, tmp_path)("law", predictions("a", "b"))  # nothing left to ask
    file.write_bytes(content[:-5])
    judge = make_judge(server, tmp_path)
    message = message_of(judge, "law", predictions("a", "b"))
    assert "cannot be reached: no complete response (ConnectionRefusedError" in message
    assert file.read_bytes() == content[: content.index(b"\n") + 1]


def test_retry_after_is_respected(tmp_path):
    with judge_server(lambda candidate, number: 429 if number == 0 else "总分：1") as server:
        start = time.monotonic()
        make_judge(server, tmp_path, first_wait=0.001)("law", predictions("a"))
        assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(
    ("answer", "total"),
    [
        ("理由。\n总分：7", 0.7),
        ("**总分：8.5**", 0.85),
        ("总分: 9/10", 0.9),
        ("总分：10分。", 1.0),
        ("Total: 3", 0.3),
        ("Fine.\n\n**Total:** 6 / 10", 0.6),
        ("Total: 2\nTotal: 4", 0.4),
        ("## 总分： 0", 0.0),
        ("总分：11", None),
        ("总分：-3", None),
        ("总分：85/100", None),
        ("总分：七", None),
        ("The total: is 7, I think", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_total_of_an_answer(answer, total):
    assert OWN_QUESTIONS.score("law", answer) == total


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("law", ("准确性", "完整性", "简洁性", "相关性", "客观性", "总分：")),
        ("summary", ("准确性", "完整性", "简洁性", "总分：")),
        ("translation", ("Accuracy", "Completeness", "Redundancy", "Total:")),
    ],
)
def test_the_question(task, words):
    prompt = "User: 旧案\n判决是： 旧判\n\n新案 {x}\n判决是：\n\nAssistant:"
    example = Example("0", prompt, "参考 {y}")
    text = OWN_QUESTIONS.question(task, Prediction(example, "", "回答 {z}"))
    for word in (*words, "新案 {x}", "参考 {y}", "回答 {z}"):
        assert word in text
    assert "旧" not in text
    assert ("相关性" in text) == (task == "law")


def test_server_and_estimate(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert "proxies" in message_of(Server("http://x/v1", "m").check, {})
    assert KEY not in repr(Server("http://x/v1", "m", KEY))
    for bad in (
        "http://[::1/v1",
        "http://x/\ud800",
        "http://a\ud800b/v1",
        "http://x\n/v1",
        "",
        "x",
    ):
        assert "no such URL" in message_of(Server, bad, "m")
    for bad in ("http://x/v1?api-key=1", f"http://{KEY}@x/v1", "http://x/v1#y"):
        assert "leave user, password" in message_of(Server, bad, "m")
    for bad in ("a\nb", "a b", "ä", "\ud800", "\x00"):
        assert "has characters" in message_of(Server, "http://x/v1", "m", bad)
    assert estimated_tokens("four score and 你好") == 3 + 2


@pytest.mark.slow
def test_a_killed_evaluation_asks_nothing_twice(tmp_path, tiny_model, data_dir):
    """The whole command is killed while it judges, and asks for no answer again."""

    def script(candidate, number):
        time.sleep(0.2)
        return 500 if number == 0 else "总分：5"

    out = tmp_path / "out"
    command = [sys.executable, "-m", "eval.run", "--model", tiny_model, "--data", data_dir]
    command += ["--tasks", "law,summary", "--output", out, "--max_new_tokens", 16]
    command += ["--judge_workers", 2, "--judge_model", "judge-model"]
    log = tmp_path / "log"
    with judge_server(script) as server, open(log, "w") as opened:
        environment = os.environ | {"JUDGE_BASE_URL": server.url, "JUDGE_API_KEY": KEY}
        arguments = {"cwd": ROOT, "env": environment, "stdout": opened, "stderr": opened}
        command = list(map(str, command))
        process = subprocess.Popen(command, **arguments)
        while sum(server.answered.values()) < 7 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)  # the client has written them
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        subprocess.run(command, check=True, **arguments)
        answered = server.answered
        assert answered.pop(None) == 2  # each start asks whether the judge is there
        # Only a request that was under way at the kill was asked again: at most 2 workers.
        assert len(answered) == 12
        assert sum(answered.values()) - len(answered) <= 2
        before = server.asked.copy()
        subprocess.run(command, check=True, **arguments)
        assert server.asked == before
    for task in ("law", "summary"):
        result = json.loads((out / task / "result.json").read_text())
        assert result["metrics"]["judge"]["value"] == 50
        assert result["metrics"]["judge"]["rows"] == 6
        assert result["counts"]["judge_model"] == "judge-model"
    for file in [log, *out.rglob("*")]:
        assert file.is_dir() or KEY not in file.read_text()
