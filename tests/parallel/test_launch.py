"""The launch files: their syntax, and that the processes they start find each other."""

import os
import subprocess

import pytest
import yaml
from helpers import ROOT

from olmoe_jax.parallel.cluster import Cluster, find_cluster

LAUNCH = ROOT / "launch"
COMMAND = ["--config", "configs/densemixer_gsm.py", "--config.train.output_dir=runs/a b"]


def run_with(commands, directory, script, environment) -> str:
    """What a bash script prints, with the named commands replaced by bash scripts."""
    for name, body in commands.items():
        file = directory / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    path = f"{directory}:{os.environ['PATH']}"
    environment = {"PATH": path, **environment}
    result = subprocess.run(
        ["bash", *script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_slurm(tmp_path):
    script = str(LAUNCH / "slurm.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    printed = run_with({"srun": 'printf "%s\\n" "$@"'}, tmp_path, [script, *COMMAND], {})
    python = ".venv/bin/python"  # of `make install`
    assert printed.splitlines() == ["--kill-on-bad-exit=1", python, "train.py", *COMMAND]
    options = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert "#SBATCH --ntasks-per-node=1" in options
    # To the tasks, not to the batch script alone (which would be B:TERM).
    assert "#SBATCH --signal=TERM@300" in options


def jobset_job():
    """Name of the JobSet, and its only replicated job."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    return jobset["metadata"]["name"], job


def test_jobset():
    name, job = jobset_job()
    spec = job["template"]["spec"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    found, _ = find_cluster([], environment)
    assert found == Cluster(f"{name}-{job['name']}-0-0.{name}:9876", spec["parallelism"], 1)
    assert spec["completions"] == spec["parallelism"]
    (mount,) = container["volumeMounts"]
    assert environment["OUTPUT"].startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize(
    ("python", "signal", "code"),
    [
        ('touch "$OUTPUT/loss.png"', None, 0),
        ("exit 2", None, 2),
        # What train.py does: it saves and exits 0, but the run is not at its end.
        ("trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done", "TERM", 1),
    ],
    ids=["finished", "failed", "stopped"],
)
def test_a_pod_succeeds_only_when_the_run_is_finished(tmp_path, python, signal, code):
    (container,) = jobset_job()[1]["template"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "python").write_text(f"#!/bin/bash\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "OUTPUT": str(tmp_path),
        "PYTHON": f"{tmp_path}/python",
    }
    command = [*container["command"], *container["args"]]
    process = subprocess.Popen(command, env=environment | {"CONFIG": "c"}, stdout=subprocess.PIPE)
    if signal:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == code


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NODE_RANK": "1",
    }
    printed = run_with(
        {"python": 'env | grep ^JAX_; printf "%s\\n" "$@"'},
        tmp_path,
        ["-c", task["run"]],
        {**variables, **task["envs"], "PYTHON": "python"},
    ).splitlines()
    environment = dict(line.split("=", 1) for line in printed if line.startswith("JAX_"))
    assert find_cluster([], environment)[0] == Cluster("10.0.0.1:9876", 2, 1)
    assert printed[-3:] == [
        "train.py",
        "--config=configs/densemixer_gsm.py",
        "--config.train.output_dir=/runs/densemixer_gsm",
    ]
