"""One process alone: the words of parallel.distributed mean nothing, and start nothing."""

import subprocess
import sys

from helpers import ROOT

from olmoe_jax.parallel import distributed


def test_alone_nothing_of_jax_is_imported():
    code = (
        "import sys; from olmoe_jax.parallel import distributed\n"
        "with distributed.joined(['--config', 'a.py']) as rest: print(rest)\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["['--config', 'a.py']", "False"]


def test_alone_nobody_is_waited_for():
    with distributed.writer_first("nothing"):
        assert distributed.is_writer()
    distributed.barrier("nothing")
    assert distributed.from_writer("value", "mine") == "mine"
    assert not distributed.is_lost_contact(RuntimeError("Gloo all-reduce failed"))


def test_help_asks_no_cluster(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere:1")
    with distributed.joined(["--help"]) as rest:
        assert rest == ["--help"]
