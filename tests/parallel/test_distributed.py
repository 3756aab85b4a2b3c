"""parallel.distributed: nothing for one process alone, and two that a launcher starts."""

import os
import subprocess
import sys

import pytest
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


@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI"])
def test_processes_find_each_other_by_what_the_launcher_says(launcher):
    job = os.getpid() % 4096  # the port depends on it
    code = (
        "from olmoe_jax.parallel import distributed as d\n"
        "with d.joined(['rest']) as rest:\n"
        "    import jax\n"
        "    print(rest, jax.process_count(), d.from_writer('id', f'from {jax.process_index()}'))"
    )
    started = []
    for number in range(2):
        of = {
            "SLURM": {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
            },
            "Open MPI": {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": str(number),
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
                "OMPI_MCA_orte_hnp_uri": f"{4096 * job}.0;tcp://127.0.0.1:34911",
            },
        }
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **of[launcher]}
        command = [sys.executable, "-c", code]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "['rest'] 2 from 0" in said
