"""The judge against a server that delays, refuses, breaks off and talks nonsense."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from helpers import ROOT, message_of

from eval.judge.client import Server
from eval.judge.judge import Judge, estimated_tokens
from eval.judge.prompts import judge_prompt, total_of
from eval.tasks.task import Example, Prediction

KEY = "sk-very-secret"


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays the server's script: what to do with the n-th request for a candidate."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "judge-model"
        prompt = body["messages"][0]["content"]
        tag = "待评答案" if "待评答案" in prompt else "candidate"
        candidate = prompt.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]
        with self.server.lock:
            number = self.server.asked[candidate]
            self.server.asked[candidate] += 1
            self.server.keys.add(self.headers.get("Authorization"))
        action = self.server.script(candidate, number)
        if isinstance(action, str):
            self.send(200, {"choices": [{"message": {"content": action}}]})
            with self.server.lock:
                self.server.answered[candidate] += 1
        elif isinstance(action, bytes):
            self.send(200, action)
        elif action is None:
            self.close_connection = True
        elif isinstance(action, float):
            time.sleep(action)
            self.close_connection = True
        elif action == -1:  # a body that ends too early
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        else:
            self.send(action, {"error": f"wrong key {KEY}?"})

    def send(self, status, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.2")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def judge_server(script):
    """Yields a server on a free port that answers script(candidate, earlier requests for it)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.lock = script, threading.Lock()
    server.asked, server.answered, server.keys = Counter(), Counter(), set()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def predictions(*answers: str) -> list[Prediction]:
    return [
        Prediction(Example(str(i), "User: 案情\n判决是：\n\nAssistant:", "驳回"), answer, answer)
        for i, answer in enumerate(answers)
    ]


def make_judge(server, path, said, **changes) -> Judge:
    settings = {"key": KEY, "timeout": 0.5, "attempts": 4, "first_wait": 0.01} | changes
    settings = Server(server.url, "judge-model", **settings)
    return Judge(settings, path / "judge.jsonl", workers=8, say=said.append)


FAULTS = {
    "fine": ["总分：7"],
    "slow": [0.7, "总分：6"],
    "busy": [429, 429, "总分：5"],
    "broken": [500, 503, "总分：4"],
    "no json": [b"<html>", "总分：3"],
    "other json": [b'{"choices": []}', b"[]", b"null", "总分：2"],
    "not text": [b"\xff\xfe", "总分：1"],
    "hangs up": [None, "总分：8.5"],
    "half a body": [-1, "总分：9"],
    "no total": ["我觉得很好。"],
    "half a character": ["\ud83d"],
    "never": [500] * 9,
    "refused": [400] * 9,
    "redirected": [302] * 9,
}
SCORES = {"fine": 0.7, "slow": 0.6, "busy": 0.5, "broken": 0.4, "no json": 0.3, "other json": 0.2}
SCORES |= {"not text": 0.1, "hangs up": 0.85, "half a body": 0.9}


def play_faults(candidate, number):
    return FAULTS[candidate][number]


def test_every_row_is_scored_or_reported(tmp_path):
    said, rows = [], predictions(*FAULTS, "fine", "no total")
    with judge_server(play_faults) as server:
        scores, counts = make_judge(server, tmp_path, said)("law", rows)
        assert server.keys == {f"Bearer {KEY}"}
        assert server.asked["busy"] == 3
        assert server.asked["fine"] == 1  # two rows, the same question
        assert server.asked["never"] == 4
        assert server.asked["refused"] == server.asked["redirected"] == 1
        asked = server.asked.copy()

        # A second run asks only for what got no answer.
        again, counts_again = make_judge(server, tmp_path, said)("law", rows)
        more = {name for name in FAULTS if server.asked[name] > asked[name]}
        assert more == {"never", "refused", "redirected"}
    expected = [SCORES.get(p.answer) for p in rows]
    assert scores == again == expected
    assert counts == counts_again
    assert counts["judge_unparsable"] == 3
    assert counts["judge_unanswered"] == 3
    assert said[0].startswith(f"judge: law: 14 requests to judge-model at {server.url} (0 answered")
    assert any("3 of 16 rows have no score: unparsable" in line for line in said)
    assert any("1 requests failed: 500" in line for line in said)
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert KEY not in written + "".join(said)
    assert "wrong key ***?" in "".join(said)


def test_a_refusal_of_the_key_ends_it_at_once(tmp_path):
    with judge_server(lambda candidate, number: 401) as server:
        judge = make_judge(server, tmp_path, [])
        message = message_of(judge, "law", predictions(*map(str, range(40))))
        assert sum(server.asked.values()) < 40
    assert "401" in message
    assert "JUDGE_API_KEY" in message
    assert KEY not in message


def test_no_server_and_torn_cache(tmp_path):
    said = []
    with judge_server(lambda candidate, number: "总分：10") as server:
        judge = make_judge(server, tmp_path, said)
        judge("law", predictions("a", "b"))
    file = tmp_path / "judge.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    judge = make_judge(server, tmp_path, said, attempts=2)
    scores, counts = judge("law", predictions("a", "b"))
    assert sorted(scores, key=str) == [1.0, None]
    assert counts["judge_unanswered"] == 1
    assert any("refused" in line for line in said)
    assert file.read_bytes() == content[: content.index(b"\n") + 1]


def test_retry_after_is_respected(tmp_path):
    with judge_server(lambda candidate, number: 429 if number == 0 else "总分：1") as server:
        start = time.monotonic()
        make_judge(server, tmp_path, [], first_wait=0.001)("law", predictions("a"))
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
def test_total_of(answer, total):
    assert total_of(answer) == total


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("law", ("准确性", "完整性", "简洁性", "相关性", "客观性", "总分：")),
        ("summary", ("准确性", "完整性", "简洁性", "总分：")),
        ("translation", ("Accuracy", "Completeness", "Redundancy", "Total:")),
    ],
)
def test_judge_prompt(task, words):
    prompt = "User: 旧案\n判决是： 旧判\n\n新案 {x}\n判决是：\n\nAssistant:"
    text = judge_prompt(task, Prediction(Example("0", prompt, "参考 {y}"), "", "回答 {z}"))
    for word in (*words, "新案 {x}", "参考 {y}", "回答 {z}"):
        assert word in text
    assert "旧" not in text
    assert ("相关性" in text) == (task == "law")


def test_server_and_estimate():
    assert KEY not in repr(Server("http://x/v1", "m", KEY))
    assert "leave user, password" in message_of(Server, "http://x/v1?api-key=1", "m")
    assert "has characters" in message_of(Server, "http://x/v1", "m", "a\nb")
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
        for answers in (2, 5, 8):
            process = subprocess.Popen(command, **arguments)
            while sum(server.answered.values()) < answers and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.1)  # the client has written them
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        subprocess.run(command, check=True, **arguments)
        answered = server.answered
        # Only a request that was under way at a kill was asked again: at most 2 workers, 3 kills.
        assert len(answered) == 12
        assert sum(answered.values()) - len(answered) <= 6
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
