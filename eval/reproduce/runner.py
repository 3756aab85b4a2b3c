"""Commands as processes, one after the other; SIGTERM ends them in order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from eval.reproduce.cells import Command
from olmoe_jax.errors import UserError
from olmoe_jax.root import ROOT


class Runner:
    """Runs commands; a SIGTERM goes on to the running command, and none starts after it.

    Args:
      output: the directory; what one command compiled is kept there for the next.
    """

    def __init__(self, output: Path):
        self._process: subprocess.Popen | None = None
        self._stopped = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            "JAX_COMPILATION_CACHE_DIR": str((output / "compiled").absolute()),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        signal.signal(signal.SIGTERM, self._stop)

    def run(self, command: Command) -> None:
        """Runs a command to its end.

        Raises:
          UserError: the command failed, or was stopped before its end.
        """
        print(" ".join(["python", *command.arguments]), flush=True)
        if not self._stopped:
            arguments = [sys.executable, *command.arguments]
            self._process = subprocess.Popen(arguments, env=self._environment)
            code = self._process.wait()
        if self._stopped:
            raise UserError(f"SIGTERM while at: {command.name}; the same command continues there")
        if code or not command.done():
            how = f"failed with exit code {code}" if code else "stopped before its end"
            raise UserError(
                f"{command.name} {how}; see what it says above; the same command continues there"
            )

    def _stop(self, *_: object) -> None:
        self._stopped = True
        if self._process:
            self._process.terminate()
