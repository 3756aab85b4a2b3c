"""The restart with glibc's huge pages."""

import os
import subprocess
import sys

import pytest

from olmoe_jax import huge_pages

SCRIPT = """
import os, sys
from olmoe_jax.huge_pages import restart_with_huge_pages
print("started", flush=True)
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.parametrize("already", [None, "", "glibc.malloc.check=1"])
def test_restarts_once_and_only_where_nothing_is_set(already):
    mode = huge_pages._MODE
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
    expected = huge_pages.TUNABLES["GLIBC_TUNABLES"] if already is None else already
    assert last == f"{expected} ['--flag', 'a b']"
