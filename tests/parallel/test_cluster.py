"""Who makes up a run, from flags and environment variables. No process is started."""

import pytest
from helpers import message_of

from olmoe_jax.parallel import cluster
from olmoe_jax.parallel.cluster import Cluster, find_cluster

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.1,10.1.0.1:34911",
}
FLAGS = ["--coordinator_address=node1:9876", "--num_processes=2", "--process_id", "1"]


@pytest.fixture(autouse=True)
def _no_tpu(monkeypatch):
    monkeypatch.setattr(cluster, "_TPU_DEVICES", ())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"JAX_NUM_PROCESSES": "1"},
        {**SLURM, "JAX_NUM_PROCESSES": "1"},
        # In the shell that salloc gives.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    ],
)
def test_a_process_alone(environment):
    arguments = ["--config", "a.py", "--config.train.seed=1"]
    assert find_cluster(arguments, environment) == (None, arguments)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (FLAGS, {}, Cluster("node1:9876", 2, 1)),
        (
            [],
            {
                "JAX_COORDINATOR_ADDRESS": "node1:9876",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "JAX_HEARTBEAT_TIMEOUT": "50",
            },
            Cluster("node1:9876", 2, 1, heartbeat_timeout=50),
        ),
        ([], SLURM, Cluster(None, 4, 2, [])),
        # Two tasks on a node: each takes a GPU of its own, unless SLURM has bound it to one.
        (
            [],
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
            Cluster(None, 4, 2, [1]),
        ),
        (
            [],
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0"},
            Cluster(None, 4, 2, []),
        ),
        (
            [],
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "JAX_LOCAL_DEVICE_IDS": "2,3"},
            Cluster(None, 4, 2),
        ),
        ([], OPEN_MPI, Cluster(None, 2, 1, [1])),
        # Open MPI's own daemons are tasks of SLURM: what Open MPI says counts.
        ([], {**SLURM, **OPEN_MPI}, Cluster(None, 2, 1, [1])),
        (FLAGS[:1], SLURM, Cluster("node1:9876", 4, 2, [])),
    ],
)
def test_several_processes(arguments, environment, expected):
    found, rest = find_cluster(["--config", "a.py", *arguments], environment)
    assert found == expected
    assert rest == ["--config", "a.py"]


def test_a_cloud_tpu_is_left_to_jax(monkeypatch):
    monkeypatch.setattr(cluster, "_TPU_DEVICES", ("null",))
    assert find_cluster([], {}) == (Cluster(), [])
    assert find_cluster([], {"JAX_NUM_PROCESSES": "1"}) == (None, [])


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (FLAGS[:2], {}, "process_id is missing"),
        (FLAGS[1:], {}, "--coordinator_address=HOST:PORT"),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1"}, "num_processes is missing"),
        ([], {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "coordinator_address is missing"),
        ([*FLAGS[:2], "--process_id=2"], {}, "process_id=2: must be below num_processes=2"),
        ([*FLAGS, "--process_id=x"], {}, "process_id=x: expected a whole number, 0 or more"),
        ([*FLAGS, "--num_processes"], {}, "num_processes=: expected a whole number"),
        ([*FLAGS, "--heartbeat_timeout=1"], {}, "heartbeat_timeout=1: expected"),
        (["--coordinator_address=node1"], {}, "expected HOST:PORT; write e.g. node1:9876"),
        (
            [],
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "write srun before it, or --num_processes=1",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(arguments, environment, expected):
    assert expected in message_of(find_cluster, arguments, environment)
