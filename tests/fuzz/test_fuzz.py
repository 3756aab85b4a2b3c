"""Damaged files and arguments for every command: one line, exit code 2, and nothing left behind.

FUZZ_SECONDS is the time of each kind of input (60), FUZZ_SEED the first seed (0), and FUZZ_KEEP a
directory for the inputs of what went wrong.
"""

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest
from fuzz.kinds import KINDS, Kind
from fuzz.mutations import NUMBERS, PATHS, Damage, damaged
from helpers import ROOT
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
LONGEST, LARGEST = 60, 3  # a command's seconds and GiB

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


class Server:
    """Runs commands in children of one process that has imported jax (server.py)."""

    def __init__(self, home: Path):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "OLMOE_JAX_CACHE": str(home / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def run(self, kind: Kind, arguments: list[str], directory: Path) -> dict:
        """Returns the answer of server.py."""
        request = {"module": kind.module, "arguments": arguments, "directory": str(directory)}
        self._process.stdin.write(json.dumps(request | {"seconds": LONGEST}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_model):
    """Returns a function of a kind's name: a directory whose `good` has a good input."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            (directory / "case").mkdir()
            KINDS[name].make(directory / "case", tiny_model)
            # The input keeps its paths: each damaged one stands at the same place.
            (directory / "case").rename(directory / "good")
            made[name] = directory
        return made[name]

    return make


def wrong(answer: Mapping, directory: Path) -> str | None:
    """Returns what a command did that it must not, or None."""
    errors = answer["stderr"].splitlines()
    if answer["code"] is None:
        return f"over {LONGEST} s"
    if answer["gib"] > LARGEST:
        return f"over {LARGEST} GiB"
    if "Traceback" in answer["stderr"] + answer["stdout"]:
        return "a traceback"
    if answer["code"] not in (0, 2):
        return f"exit code {answer['code']}"
    if answer["code"] == 2:
        if len(errors) != 1 or not errors[0].startswith("error: "):
            return "not one line that begins with error:"
        if left := [path.name for path in directory.iterdir() if path.name not in ("case", "good")]:
            return f"left {left} behind"
    return None


def fuzz(server: Server, kind: Kind, directory: Path, base: Path, inputs) -> None:
    """Runs a kind's command on inputs for `SECONDS`, and fails with all that went wrong."""
    counts: collections.Counter[str] = collections.Counter()
    found: dict[str, str] = {}
    end = time.monotonic() + SECONDS

    def run(damage: Damage | None, change: tuple[int, str] | None) -> None:
        if counts and time.monotonic() > end:
            return
        case, out = directory / "case", directory / "out"
        _remove(case), _remove(out)
        shutil.copytree(directory / "good", case)
        if damage:
            damage.apply(case)
        arguments = list(kind.arguments)
        if change:
            arguments[change[0]] = _changed(arguments[change[0]], change[1])
            (case / "loop").symlink_to("loop")
            os.mkfifo(case / "fifo")
            (case / "file").write_text("a")
        values = {"{case}": case, "{base}": base, "{out}": out}
        for name, value in values.items():
            arguments = [argument.replace(name, str(value)) for argument in arguments]
        # Its parent is of this input alone too: a command may be told to write to `..`.
        scratch = directory / "scratch"
        (scratch / "work").mkdir(parents=True)
        answer = server.run(kind, arguments, scratch / "work")
        if [path.name for path in scratch.rglob("*")] == ["work"]:
            _remove(scratch)
        fault = wrong(answer, directory)
        counts[fault or f"exit code {answer['code']}"] += 1
        if fault:
            last = answer["stderr"].strip().rpartition("\n")[2][-300:]
            key = f"{fault}: {last}"
            if key not in found:
                found[key] = f"{damage or change}"[:200]
                _keep(case, f"{len(found)}", f"{arguments}\n{damage and damage.file}\n{answer}")
        _remove(scratch)

    run(None, None)
    assert counts == {"exit code 0": 1}, f"the good input: {counts} {found}"
    for seed in itertools.count(SEED):
        if time.monotonic() > end:
            break
        _one_block(run, inputs, seed)
    print(f"{sum(counts.values())} inputs: {dict(counts)}")
    assert not found, "\n".join(f"{what}\n    {how}" for what, how in found.items())


def _one_block(run, inputs, seed: int) -> None:
    """Runs 50 inputs that Hypothesis draws."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=50,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def block(drawn) -> None:
        run(*drawn)

    block()


def _changed(argument: str, value: str) -> str:
    """Returns an argument with another value; --FIELD=VALUE keeps its field."""
    name, equals, _ = argument.partition("=")
    return f"{name}={value}" if equals else value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _keep(case: Path, name: str, notes: str) -> None:
    """Copies an input that went wrong to FUZZ_KEEP."""
    if "FUZZ_KEEP" in os.environ:
        kept = Path(os.environ["FUZZ_KEEP"], f"{case.parent.name}-{name}")
        shutil.copytree(
            case, kept, symlinks=True, dirs_exist_ok=True, ignore=lambda where, names: _fifos(where)
        )
        (kept / "NOTES").write_text(notes, errors="backslashreplace")


def _fifos(directory: str) -> list[str]:
    return [path.name for path in Path(directory).iterdir() if path.is_fifo()]


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file(name, server, good, tiny_model):
    kind, directory = KINDS[name], good(name)
    inputs = st.tuples(damaged(kind.files(directory / "good")), st.none())
    fuzz(server, kind, directory, tiny_model, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_argument(name, server, good, tiny_model):
    kind, directory = KINDS[name], good(name)
    places = [
        index for index, argument in enumerate(kind.arguments) if not argument.startswith("--")
    ] + [index for index, argument in enumerate(kind.arguments) if "=" in argument]
    changes = st.tuples(st.sampled_from(places), st.sampled_from(PATHS + NUMBERS))
    fuzz(server, kind, directory, tiny_model, st.tuples(st.none(), changes))
