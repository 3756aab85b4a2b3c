"""Whether this process is one of several that make one run, as its flags and environment say.

This module needs no jax, except on a Cloud TPU.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_jax.errors import UserError

HEARTBEAT_TIMEOUT = 30
"""Seconds after which a process that says nothing counts as dead."""

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
    "heartbeat_timeout": "JAX_HEARTBEAT_TIMEOUT",
}
"""Flags of a command that may run as several processes, and what stands for them."""

_TPU_DEVICES = ("accel*", "vfio/[0-9]*")


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, and which of them this one is.

    local_device_ids: the GPUs that this process takes; None: all that it sees.
    heartbeat_timeout: seconds.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT


def find_cluster(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[Cluster | None, list[str]]:
    """The cluster (None: this process is alone), and the arguments without the cluster's flags.

    Flags count more than variables, and both more than what SLURM, Open MPI or a Cloud TPU say.

    Raises:
      UserError: only a part of what is needed is known, or it does not fit together.
    """
    flags, rest = _split_flags(arguments)
    variables = {
        name: environment[variable]
        for name, variable in VARIABLES.items()
        if environment.get(variable)
    }
    given = {name: _parse(name, text) for name, text in (variables | flags).items()}
    heartbeat = {name: given.pop(name) for name in ("heartbeat_timeout",) if name in given}
    known = (_slurm(environment) or _open_mpi(environment) or {}) | given
    known = known or _cloud_tpu() or {}
    if not known or known.get("num_processes") == 1:
        return None, rest
    for name in ("coordinator_address", "num_processes", "process_id"):
        if name not in known:
            raise UserError(
                f"{name} is missing: each of several processes needs --coordinator_address="
                "HOST:PORT, --num_processes=N and --process_id=I (or "
                "$JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID)"
            )
    if known["process_id"] >= known["num_processes"]:
        raise UserError(
            f"process_id={known['process_id']}: must be below num_processes="
            f"{known['num_processes']}; the processes are numbered from 0"
        )
    return Cluster(**known, **heartbeat), rest


def _split_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our flags, as --name=value or --name value, and everything else."""
    flags, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in VARIABLES:
            others.append(argument)
            continue
        flags[name] = value if equals else next(rest, "")
    return flags, others


def _parse(name: str, text: str) -> Any:
    if name == "coordinator_address":
        if not re.fullmatch(r".+:\d+", text):
            raise UserError(f"{name}={text}: expected HOST:PORT; write e.g. node1:9876")
        return text
    lowest = {"num_processes": 1, "process_id": 0, "heartbeat_timeout": 5}[name]
    if not text.isascii() or not text.isdigit() or int(text) < lowest:
        raise UserError(f"{name}={text}: expected a whole number, {lowest} or more")
    return int(text)


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """A task of an srun with several tasks."""
    step = _numbers(environment, "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    nodes = environment.get("SLURM_STEP_NODELIST")
    if step is None or not nodes:
        _refuse_batch_without_srun(environment)
        return None
    job, tasks, task = step
    if tasks == 1:
        return None
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    several = tasks > int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    local = int(environment.get("SLURM_LOCALID", "0"))
    return {
        "coordinator_address": f"{found[1]}{found[2] or ''}:{_port(job)}",
        "num_processes": tasks,
        "process_id": task,
        "local_device_ids": _own_gpu(environment, several, local),
    }


def _refuse_batch_without_srun(environment: Mapping[str, str]) -> None:
    """A batch script's own process is no task, though it sees the number of tasks."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" not in environment and tasks != "1":
        raise UserError(
            f"SLURM gives this job {tasks} tasks, but the command was not started by srun; write "
            "srun before it, or --num_processes=1 to run it as one process"
        )


def _open_mpi(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """A process of an mpirun with several processes."""
    sizes = _numbers(environment, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if sizes is None or sizes[0] == 1:
        return None
    several = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    known = {
        "num_processes": sizes[0],
        "process_id": sizes[1],
        "local_device_ids": _own_gpu(environment, several, local),
    }
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; Open MPI 5 has none.
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", launcher)
    if found:
        # Job numbers are multiples of 4096.
        address = f"{found[2] or found[3]}:{_port(int(found[1]) // 4096)}"
        known["coordinator_address"] = address
    return known


def _cloud_tpu() -> dict[str, Any] | None:
    """A host of a Cloud TPU slice with several hosts, or of several slices, as jax finds it."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in _TPU_DEVICES):
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

    for kind in (GceTpuCluster, GkeTpuCluster):
        if kind.is_env_present():
            count = kind.get_process_count()
            if count == 1:
                return None
            return {
                "coordinator_address": kind.get_coordinator_address(300, None),
                "num_processes": count,
                "process_id": kind.get_process_id(),
            }
    return None


def _numbers(environment: Mapping[str, str], *names: str) -> list[int] | None:
    values = [environment.get(name, "") for name in names]
    return [int(value) for value in values] if all(map(str.isdigit, values)) else None


def _port(job: int) -> int:
    """A port that all processes of a job agree on, and two jobs seldom: one of the last 4096."""
    return 65536 - 4096 + job % 4096


def _own_gpu(environment: Mapping[str, str], several: bool, local: int) -> list[int] | None:
    """Of several processes on a node each takes one GPU, unless the launcher has given it one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not several or environment.get("JAX_LOCAL_DEVICE_IDS") or visible.isdigit():
        return None
    return [local]
