"""A judge of the tests: a server on a free port that plays a script."""

import http.server
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager

from eval.judge.client import Server
from eval.judge.judge import Judge
from eval.judge.prompts import OWN_QUESTIONS
from eval.tasks.task import Example, Prediction

KEY = "sk-very-secret"


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays the server's script: what to do with the n-th request for a candidate."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "judge-model"
        prompt = body["messages"][0]["content"]
        candidate = re.search(r"<(待评答案|candidate)>\n(.*?)\n</\1>|$", prompt, re.DOTALL)[2]
        with self.server.lock:
            number = self.server.asked[candidate]
            self.server.asked[candidate] += 1
            self.server.keys.add(self.headers.get("Authorization"))
        action = self.server.probe if candidate is None else self.server.script(candidate, number)
        if callable(action):
            self.close_connection = True
            action(self.wfile.write)
        elif isinstance(action, str):
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

    def do_GET(self):
        assert self.path == "/v1/models"
        self.send(404, {})

    def send(self, status, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.2")
        if status == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Listener(http.server.ThreadingHTTPServer):
    request_queue_size = 100

    def handle_error(self, *_):
        """The client hangs up on purpose."""


@contextmanager
def judge_server(script):
    """Yields a server on a free port that answers script(candidate, earlier requests for it)."""
    server = Listener(("127.0.0.1", 0), Handler)
    server.script, server.lock = script, threading.Lock()
    server.asked, server.answered, server.keys = Counter(), Counter(), set()
    server.probe = "yes"
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


def make_judge(server, path, **changes) -> Judge:
    settings = {"key": KEY, "timeout": 1, "attempts": 4, "first_wait": 0.01} | changes
    settings = Server(server.url, "judge-model", **settings)
    return Judge(settings, OWN_QUESTIONS, path / "judge.jsonl")
