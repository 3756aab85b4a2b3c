"""Several processes of one run on this machine, as a launcher would start them."""

import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from training.tiny_run import ROOT

_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass
class Processes:
    """Started processes; each writes into a log of its own."""

    started: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, timeout: float = 300) -> list[int]:
        """Their exit codes; fails when one still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(1, deadline - time.monotonic())) for p in self.started]
        finally:
            for process in self.started:
                process.kill()

    def output(self) -> list[str]:
        """What each wrote, without the lines in which gloo counts its peers."""
        return [
            "".join(
                line
                for line in log.read_text().splitlines(keepends=True)
                if not line.strip().isdigit() and "[Gloo]" not in line
            )
            for log in self.logs
        ]


def start(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str],
    count: int = 2,
    devices: int = 1,
    extra: Sequence[Sequence[str]] = (),
) -> Processes:
    """Starts `count` processes with `devices` virtual devices each.

    `extra`: arguments that each has besides.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log.with_name(f"{log.name}.{index}") for index in range(count)]
    several = {} if count == 1 else {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    started = []
    for index, file in enumerate(logs):
        numbers = {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        own = {
            **environment,
            **several,
            **numbers,
            "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {_DEVICES}={devices}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        # Compiled programs for several devices or processes are not to be taken from a cache.
        if count * devices > 1:
            own.pop("JAX_COMPILATION_CACHE_DIR", None)
        with file.open("w") as out:
            arguments = [*command, *(extra[index] if extra else [])]
            started.append(subprocess.Popen(arguments, stdout=out, stderr=out, env=own, cwd=ROOT))
    return Processes(started, logs)
