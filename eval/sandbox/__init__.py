"""A sandbox of the Linux kernel for programs that a model wrote.

`launcher.py`, a process of its own, describes what contains a program. This side starts the
launcher with an empty environment, reads its pipes up to a limit, and kills it when the time is
over.

Not covered: a program can cheat on its own score in many ways, which docs/evaluation.md lists.
"""

import concurrent.futures
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from eval.sandbox import seccomp
from olmoe_jax.errors import UserError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SETUP_FAILED = 3
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "PYTHONHASHSEED": "0",  # the order of sets of strings, hence the score, repeats
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """Limits of one program, which is one process."""

    program_seconds: float = 0
    """Seconds from the program's begin to the end of its tests; 0: the other limits alone hold."""
    cpu_seconds: int = 20
    """The slowest canonical solution takes 5.4 s on a slow machine."""
    wall_seconds: float = 90.0
    memory_bytes: int = 300 << 20
    """Address space; what the kernel needs for it comes on top (`launcher.py`)."""
    tmp_bytes: int = 16 << 20
    """All files in /tmp together, and each file."""
    threads: int = 6
    """The supervisor counts."""
    output_bytes: int = 1 << 20


def check() -> None:
    """Makes sure that this machine can contain programs.

    Raises:
      UserError: this machine cannot, and why.
    """
    if sys.platform != "linux" or os.uname().machine not in seccomp.MACHINES:
        raise UserError(
            "--allow_code_execution: the sandbox needs Linux on x86_64 or aarch64; leave out the "
            "code tasks"
        )
    failure = run("answer = 42", "assert answer == 42")
    if failure:
        raise UserError(f"--allow_code_execution: the sandbox does not work here ({failure})")


def run_all(
    programs: Sequence[tuple[str, str]],
    limits: Limits = Limits(),
    **changes: float,
) -> list[str | None]:
    """Returns `run` of each (program, tests), one on each CPU at once.

    `changes` replaces fields of the limits.
    """
    limits = replace(limits, **changes)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: run(*pair, limits), programs))


def run(program: str, tests: str, limits: Limits = Limits()) -> str | None:
    """Runs a program and then its tests in the same module.

    Returns:
      None if both ran to the end without an exception, else what happened in a few words.

    Raises:
      UserError: this machine cannot contain the program, which did not run.
    """
    token = secrets.token_hex(16)
    request = {
        "token": token,
        "program": f"{program}\n\n{tests}",
        "limits": asdict(limits),
        "readable": _readable_directories(),
        "filter": seccomp.program(os.uname().machine).hex(),
    }
    result_read, result_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_LAUNCHER), str(result_write)],
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[result_write],
            start_new_session=True,
        )
    finally:
        os.close(result_write)
    with process, open(result_read, "rb", buffering=0) as result:
        try:
            _send(process, json.dumps(request).encode())
            answer, stopped = _watch(process.stdout, result, limits)
        finally:
            # The sandbox's first process dies with the launcher, and all others with the first.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not stopped and process.returncode == _SETUP_FAILED:
        raise UserError(
            f"--allow_code_execution: programs cannot be contained here ({answer}); run as a user "
            "who may create user namespaces (in a container: --privileged), or leave the code "
            "tasks out"
        )
    if stopped or answer == token:
        return stopped
    return answer or "ended before its tests did"


def _send(process: subprocess.Popen, request: bytes) -> None:
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:  # the launcher could not start; its exit status says so
        pass


def _watch(output: IO[bytes], result: IO[bytes], limits: Limits) -> tuple[str, str | None]:
    """Returns the result, and why the program was stopped (None: the program ended by itself)."""
    deadline = time.monotonic() + limits.wall_seconds
    answer, written = b"", 0
    with selectors.DefaultSelector() as selector:
        for pipe in (output, result):
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            if (left := deadline - time.monotonic()) <= 0:
                return "", "took too long"
            for key, _ in selector.select(left):
                content = os.read(key.fd, 1 << 16)
                if not content:
                    selector.unregister(key.fileobj)
                elif key.fileobj is result:
                    answer += content
                else:
                    written += len(content)
                if len(answer) > 4096 or written > limits.output_bytes:
                    return "", "wrote too much output"
    return answer.decode("utf-8", "replace"), None


def _readable_directories() -> list[str]:
    """Returns the directories of interpreter and system libraries, none inside another."""
    wanted = {os.path.realpath(path) for path in ("/usr", sys.base_prefix, sys.prefix)}
    wanted |= {path for path in ("/bin", "/lib", "/lib64") if not os.path.islink(path)}
    wanted |= {os.path.abspath(path) for path in (sys.base_prefix, sys.prefix)}
    found = sorted(path for path in wanted if os.path.isdir(path))
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]
