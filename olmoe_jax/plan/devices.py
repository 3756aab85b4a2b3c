"""The devices that a plan knows: their figures, and how to compile for absent ones.

The figures are the vendors' (NVIDIA's H100 SXM5 data sheet, Google's Cloud TPU documentation).
Importing this module does not import jax, so that the command can set jax's environment first.
"""

import dataclasses
import math
import os
import re
from typing import Any

from olmoe_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """A kind of device. None stands for a figure that is not known or does not apply."""

    name: str  # the vendor's
    platform: str  # jax's name, "gpu", "tpu" or "cpu"; selects the backends
    # Bytes that a program can get (on a TPU the compiler's limit); 0: this machine's memory,
    # divided by the number of devices.
    capacity: int = 0
    reserve: int = 0  # bytes that no compiler counts: CUDA context, cuDNN and cuBLAS, NCCL
    flops: float | None = None  # peak FLOP/s in bfloat16
    bandwidth: float | None = None  # of the memory, bytes/s
    interconnect: float | None = None  # bytes/s that a device can send while it receives as much
    per_host: int | None = None  # number of devices that `interconnect` joins
    between_hosts: float | None = None  # bytes/s that a device can send to another host
    install: str | None = None  # command that installs the compiler
    shapes: dict[int, str] = dataclasses.field(default_factory=dict)  # TPU slices by their chips


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_CUDA, _TPU = 'pip install "jax[cuda13]"', 'pip install "jax[tpu]"'

# TPU interconnect: half of the documented bidirectional bandwidth per chip, all its ports together.
# H100: NVLink inside a host of 8, one 400 Gb/s adapter for each GPU between hosts.
KINDS = {
    "h100": DeviceKind(
        "NVIDIA H100 80GB (SXM)", "gpu", 84929347584, 3 * GIB // 2, 989e12, 3.35e12, 450e9,
        per_host=8, between_hosts=50e9, install=_CUDA,
    ),
    "v5e": DeviceKind(
        "TPU v5e", "tpu", int(15.75 * GIB), 0, 197e12, 819e9, 200e9, install=_TPU, shapes=_FLAT
    ),
    "v6e": DeviceKind(
        "TPU v6e", "tpu", int(31.24 * GIB), 0, 918e12, 1640e9, 400e9, install=_TPU, shapes=_FLAT
    ),
    "v5p": DeviceKind(
        "TPU v5p", "tpu", int(95.73 * GIB), 0, 459e12, 2765e9, 600e9, install=_TPU, shapes=_CUBE
    ),
    "cpu": DeviceKind("CPU", "cpu"),
}  # fmt: skip

_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The answers of an H100's CUDA driver to what XLA asks a device."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind. `name` is the user's word, `shape` the compiler's for the layout."""

    name: str
    kind: DeviceKind
    count: int
    shape: str

    @property
    def capacity(self) -> int:
        """The memory of each device, bytes."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.kind.capacity or memory // self.count

    @property
    def interconnect(self) -> float | None:
        """Bytes/s that a device can send over the slowest link between the devices."""
        kind = self.kind
        between = kind.per_host and self.count > kind.per_host and kind.between_hosts
        return between or kind.interconnect


def parse_topology(text: str) -> Topology:
    """Returns the topology that `text` names: KIND:COUNT, or for TPUs KIND:SHAPE.

    Raises:
      UserError: the kind is unknown, or does not come in this number or shape.
    """
    name, _, size = text.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise UserError(
            f"--topology={text}: no such device; write KIND:COUNT with one of {', '.join(KINDS)}, "
            "e.g. h100:8 or v5e:2x4"
        )
    if kind.shapes and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        shape, count = size, math.prod(map(int, size.split("x")))
        if shape not in kind.shapes.values():
            raise UserError(f"--topology={text}: {_sizes(name, kind)}")
        return Topology(text, kind, count, f"{name}:{shape}")
    count = int(size) if re.fullmatch(r"[1-9]\d{0,3}", size) else 0
    whole_hosts = not kind.per_host or count <= kind.per_host or count % kind.per_host == 0
    if not count or not whole_hosts or (kind.shapes and count not in kind.shapes):
        raise UserError(f"--topology={text}: {_sizes(name, kind)}")
    if kind.platform == "gpu":
        hosts = math.ceil(count / kind.per_host)
        return Topology(text, kind, count, f"1x{hosts}x{count // hosts}")
    return Topology(text, kind, count, f"{name}:{kind.shapes.get(count, count)}")


def _sizes(name: str, kind: DeviceKind) -> str:
    """Returns a sentence that says what to write after the colon."""
    if kind.shapes:
        known = ", ".join(f"{count} ({shape})" for count, shape in kind.shapes.items())
        return f"write the number of chips or the shape of a slice: {known}"
    if kind.per_host:
        return f"write {name}:COUNT with 1 to {kind.per_host}, or a multiple of {kind.per_host}"
    return f"write {name}:COUNT with a number of devices, e.g. {name}:8"


def prepare_environment(topology: Topology) -> None:
    """Sets the variables that jax reads when it starts."""
    # A plan never touches this machine's accelerators: a run may be using them.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA warns that there is no device. Where a program's arguments and outputs take over 80% of a
    # GPU's memory it also logs an error, "exceeds the base limit", which is none: it then orders
    # the program for the least memory. Real errors reach Python as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if topology.kind.platform == "cpu":
        flag = f"--xla_force_host_platform_device_count={topology.count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def open_devices(topology: Topology) -> list[Any]:
    """Returns the devices to compile for: real ones for a CPU, else descriptions.

    Raises:
      UserError: the compiler is not installed, or this process has too few CPU devices.
    """
    import jax

    kind = topology.kind
    if kind.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.count:
            raise UserError(
                f"--topology={topology.name}: this process has {len(devices)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.count} before jax "
                "starts (the command does)"
            )
        return devices[: topology.count]
    try:
        return _describe(topology)
    except (NotImplementedError, RuntimeError) as error:
        if "not implemented" in str(error) or "not installed" in str(error):
            raise UserError(
                f"--topology={topology.name}: the compiler for {kind.name} is not installed; run "
                f"{kind.install} (no device is needed)"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={topology.name}: the compiler does not accept it ({reason}); "
            f"{_sizes(topology.name.partition(':')[0], kind)}"
        ) from error


def _describe(topology: Topology) -> list[Any]:
    """Returns descriptions of GPUs or TPUs, for which XLA compiles without the devices.

    Raises `NotImplementedError` or `RuntimeError` if the compiler is missing or refuses.
    """
    from jax.experimental import topologies

    if topology.kind.platform == "gpu":
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology.name,
            target_config=_H100_TARGET,
            topology=topology.shape,
        )
        return list(description.devices)
    # Without the first three, libtpu asks the network which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # libtpu refuses a second process, for the sake of a TPU that compiling does not use.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology.shape)
    return list(description.devices)
