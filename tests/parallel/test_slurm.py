"""launch/slurm.sbatch on a real SLURM of one node, where its daemons are installed."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from training.tiny_run import losses, make_files

pytestmark = pytest.mark.slow

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={path}/munge.socket
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes={host} Default=YES
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment in which sbatch talks to a SLURM of our own."""
    if os.geteuid() != 0 or not all(map(shutil.which, (*DAEMONS, "sbatch"))):
        pytest.skip("needs root, and munge and slurm-wlm installed")
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in DAEMONS[1:]]
        ports = [each.getsockname()[1] for each in sockets]
    host = socket.gethostname().split(".")[0]
    (tmp_path / "slurm.conf").write_text(
        CONFIG.format(host=host, path=tmp_path, ports=ports, cpus=max(2, os.cpu_count()))
    )
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    own = [f"--{name}={tmp_path / 'munge'}.{name}" for name in ("socket", "pid-file", "seed-file")]
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *own],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    with (tmp_path / "daemons.log").open("w") as log, contextlib.ExitStack() as running:
        for command in commands:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            running.callback(process.wait)
            running.callback(process.terminate)
            time.sleep(1)
        yield environment


def test_the_batch_script(slurm, tmp_path, tokenizer_dir):
    """Two tasks on one node find each other and make one run, of which one writes."""
    files = make_files(tmp_path / "files", tokenizer_dir)
    output, log = tmp_path / "run", tmp_path / "job.log"
    options = {
        "data__eval_path": None,
        "data__eval_fraction": 0.0,
        "train__max_steps": 2,
    }
    # Two tasks instead of one on each node, and no GPU.
    sbatch = ["sbatch", "--wait", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={log}"]
    command = [*sbatch, "launch/slurm.sbatch", *files.arguments(output, **options)]
    own = {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    result = subprocess.run(
        command, env=slurm | own, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    said = log.read_text() if log.exists() else (tmp_path / "daemons.log").read_text()
    assert result.returncode == 0, result.stderr + said
    assert said.count("devices: 2 x cpu in 2 processes") == 1
    assert said.count("exported step 2") == 1
    assert len(losses(output)) == 2
    assert (output / "hf" / "model.safetensors").exists()
    assert (output / "loss.png").exists()
    assert len(list((output / "tensorboard").iterdir())) == 1
