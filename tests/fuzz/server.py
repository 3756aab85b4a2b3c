"""Runs commands in children of a process that has imported jax, a second less for each.

Standard input has one JSON object a line: {"module", "arguments", "directory", "seconds"}. Standard
output gets one: {"code", "seconds", "gib", "stdout", "stderr"}; the code is null where the time ran
out.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def serve() -> None:
    """Answers requests until standard input ends."""
    for name in ("jax", "matplotlib.pyplot", "orbax.checkpoint", "transformers", "datasets"):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        importlib.import_module(request["module"])
        print(json.dumps(_run(request)), flush=True)


def _run(request: dict) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in ("stdout", "stderr")]
        start = time.monotonic()
        child = os.fork()
        if not child:
            _command(request, files)
        code, usage = _wait(child, start + request["seconds"])
        said = {file.name: file.read_bytes().decode("utf-8", "replace") for file in files}
    gib = usage.ru_maxrss / 2**20
    return {"code": code, "seconds": time.monotonic() - start, "gib": gib} | said


def _command(request: dict, files: list[Path]) -> None:
    """Becomes the command, in a process group of its own."""
    os.setpgid(0, 0)
    for target, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["directory"])
    sys.argv = [request["module"], *request["arguments"]]
    code = 1
    try:
        from olmoe_jax.errors import run_command

        run_command(importlib.import_module(request["module"]).main)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Threads that libraries left behind must not keep the child.
        os._exit(code)


def _wait(child: int, end: float):
    """Returns the exit code (None: the time ran out) and the resources used."""
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            _end_group(child)
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.01)
    _end_group(child)
    return None, os.wait4(child, 0)[2]


def _end_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    serve()
