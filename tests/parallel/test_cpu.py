"""What is decided for CPUs before jax starts: huge pages, a device for every core."""

import os
import subprocess
import sys

import pytest

from olmoe_jax.parallel import cpu

SCRIPT = """
import os, sys
from olmoe_jax.parallel.cpu import restart_with_huge_pages
print("started", flush=True)
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.parametrize("already", [None, "", "glibc.malloc.check=1"])
def test_restarts_once_and_only_where_nothing_is_set(already):
    mode = cpu._MODE
    if not mode.exists() or "[madvise]" not in mode.read_text():
        pytest.skip("huge pages are not left to programs here")
    environment = {name: os.environ[name] for name in os.environ if name != "GLIBC_TUNABLES"}
    if already is not None:
        environment["GLIBC_TUNABLES"] = already
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--flag", "a b"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *starts, last = result.stdout.splitlines()
    assert len(starts) == (2 if already is None else 1)
    expected = cpu.TUNABLES["GLIBC_TUNABLES"] if already is None else already
    assert last == f"{expected} ['--flag', 'a b']"


@pytest.mark.parametrize(
    ("cores", "environment", "devices"),
    [
        (1, {}, "1"),
        (3, {}, "2"),
        (96, {}, "16"),
        (4, {"JAX_NUM_CPU_DEVICES": "3"}, "3"),
        (4, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, None),
    ],
)
def test_a_device_for_every_core(monkeypatch, cores, environment, devices):
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    cpu.use_all_cores()
    assert os.environ.get("JAX_NUM_CPU_DEVICES") == devices
