"""Trains one run after the other, in one process or as one of several.

python runs_worker.py SPEC.json: [{"config": {section: {field: value}}, "stop_after": step or null}]
With stop_after, process 0 gets a SIGTERM when it reports that step.
"""

import json
import os
import signal
from pathlib import Path

import olmoe_jax
from olmoe_jax.config import from_dict
from olmoe_jax.errors import run_command
from olmoe_jax.parallel import distributed
from olmoe_jax.training.reporting import Reporter


def main(arguments) -> None:
    with distributed.joined(arguments) as (file,):
        for run in json.loads(Path(file).read_text()):
            _stop_after(run["stop_after"])
            result = olmoe_jax.train(from_dict(run["config"]))
            assert result.finished == (run["stop_after"] is None)


def _stop_after(step: int | None) -> None:
    def report(self, line, scalars):
        _original(self, line, scalars)
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Reporter.step = report


_original = Reporter.step

if __name__ == "__main__":
    run_command(main)
