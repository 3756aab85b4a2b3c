"""The processes of a run and this one's place, by flags, environment variables and launcher.

jax itself finds the address of process 0 under SLURM and Open MPI, and everything on a Cloud TPU.
This module imports no jax: most runs are one process, and a command's --help must be quick.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_jax.errors import UserError, whole_number

HEARTBEAT_TIMEOUT = 30
"""Seconds without a heartbeat after which a process counts as dead."""

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
    "heartbeat_timeout": "JAX_HEARTBEAT_TIMEOUT",
}
"""The flags of a command that may run as several processes, and the variable for each."""

_LAUNCHERS = (
    (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_MCA_orte_hnp_uri",  # not of Open MPI 5
    ),
    (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_STEP_TASKS_PER_NODE",  # "4", or "4(x2)" on two nodes
        "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
    ),
)
"""Variables of Open MPI and SLURM: the number of processes, this process's number, both again on
its node, and where jax finds process 0's address. Open MPI first: under SLURM, the daemons that
start its processes are tasks of SLURM."""

_LOWEST = {"num_processes": 1, "process_id": 0, "heartbeat_timeout": 5}
_TPU_DEVICES = ("accel*", "vfio/[0-9]*")


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, and which of them this one is.

    None: `jax.distributed.initialize()` finds the value.
    """

    coordinator_address: str | None = None  # HOST:PORT at which process 0 serves the others
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None  # GPUs of this process; empty: all that it sees
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT  # seconds


def find_cluster(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[Cluster | None, list[str]]:
    """Returns the cluster (None: this process is alone) and the arguments without its flags.

    A flag overrides a variable, and both override what the launcher says.

    Raises:
      UserError: the cluster is known only in part, or the parts contradict each other.
    """
    flags, rest = _split_flags(arguments)
    variables = {
        name: environment[variable]
        for name, variable in VARIABLES.items()
        if environment.get(variable)
    }
    given: dict[str, Any] = {name: _parse(name, text) for name, text in (variables | flags).items()}
    heartbeat_timeout = given.pop("heartbeat_timeout", HEARTBEAT_TIMEOUT)
    known = _launched(environment) | given
    if not known:
        on_tpu = any(any(Path("/dev").glob(pattern)) for pattern in _TPU_DEVICES)
        return (Cluster(heartbeat_timeout=heartbeat_timeout) if on_tpu else None), rest
    if known.get("num_processes") == 1:
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
    return Cluster(**known, heartbeat_timeout=heartbeat_timeout), rest


def _split_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the cluster's flags (--name=value or --name value) and all other arguments."""
    flags, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in VARIABLES:
            others.append(argument)
            continue
        flags[name] = value if equals else next(rest, "")
    return flags, others


def _parse(name: str, text: str) -> str | int:
    if name == "coordinator_address":
        if not re.fullmatch(r".+:\d+", text):
            raise UserError(f"{name}={text}: expected HOST:PORT; write e.g. node1:9876")
        return text
    try:
        return whole_number(_LOWEST[name])(text)
    except UserError as error:
        raise UserError(f"{name}={error}") from None


def _launched(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a launcher says of the several processes that it started; {}: no launcher did.

    Raises:
      UserError: a batch script of several tasks runs the command itself.
    """
    for processes, process, on_node, number, address in _LAUNCHERS:
        if environment.get(processes, "1") == "1":
            continue
        known: dict[str, Any] = {
            "num_processes": int(environment[processes]),
            "process_id": int(environment[process]),
        }
        if environment.get(address):
            known["coordinator_address"] = None  # for jax to find
        if not environment.get("JAX_LOCAL_DEVICE_IDS"):  # which jax reads itself
            alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(on_node, "1"))
            bound = environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()
            # Left to itself, jax gives one GPU also to the only process of a node with eight.
            known["local_device_ids"] = [] if alone or bound else [int(environment[number])]
        return known
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" not in environment and tasks != "1":
        raise UserError(
            f"SLURM gives this job {tasks} tasks, but the command was not started by srun; write "
            "srun before it, or --num_processes=1 to run it as one process"
        )
    return {}
