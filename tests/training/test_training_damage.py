"""A damaged file of a run's directory: never another loss, never a traceback.

Each case damages one file of a stopped run. Reading the run and continuing it then give what they
give of the undamaged run, perhaps from the checkpoint before, or end in one line.
"""

import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.tiny_run import exported_bytes

import olmoe_jax
from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.opening import RunCheckpoint, open_source
from olmoe_jax.errors import UserError, outcome
from olmoe_jax.training import loop
from olmoe_jax.training.best import best_step
from olmoe_jax.training.reporting import Reporter

pytestmark = pytest.mark.slow

STEPS, STOPPED = 8, 6
OPTIONS = {
    "method__name": "esft_gate",
    "method__esft_score_tokens": 200,
    "train__epochs": 4,
    "train__max_steps": STEPS,
    "train__checkpoint_every": 2,
    "train__keep_checkpoints": 2,
    "train__eval_every": 3,
}
SEED = int(os.environ.get("OLMOE_JAX_DAMAGE_SEED", "0"))


@pytest.fixture(scope="module")
def once():
    """Compiles the run's functions once; every run of the module gets a state of its own."""
    built, original = [], loop.build_program

    def build(*arguments):
        if not built:
            program = original(*arguments)
            built.append((program, jax.tree.map(np.asarray, program.state)))
        program, state = built[0]
        # Copies: a step takes the state's memory.
        program = dataclasses.replace(program, state=jax.tree.map(jnp.array, state))
        program.hold(program.state.parameters)
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_program", build)
        yield


@dataclasses.dataclass(frozen=True)
class Runs:
    """A whole run, and the same one stopped."""

    files: object
    whole: Path
    stopped: Path
    weights: tuple[bytes, ...]  # of the stopped run's checkpoints

    def config(self, output: Path):
        return self.files.config(output, **OPTIONS)


@pytest.fixture(scope="module")
def runs(files, once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage")
    olmoe_jax.train(files.config(directory / "whole", **OPTIONS))
    original = Reporter.step

    def step(self, line, scalars):
        original(self, line, scalars)
        if line["step"] == STOPPED - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        result = olmoe_jax.train(files.config(directory / "stopped", **OPTIONS))
    assert result.step == STOPPED
    saved = sorted(int(path.name) for path in (directory / "stopped" / "checkpoints").iterdir())
    assert len(saved) >= 2
    weights = tuple(weights_of(RunCheckpoint(directory / "stopped", step)) for step in saved)
    return Runs(files, directory / "whole", directory / "stopped", weights)


def weights_of(source) -> bytes:
    return b"".join(
        source.read(weight, layer).tobytes()
        for weight in names.weights(source.config)
        for layer in names.layer_indices(weight, source.config)
    )


def flip(file: Path, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    bit = generator.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def cut(file: Path, generator: random.Random) -> None:
    os.truncate(file, int(file.stat().st_size * generator.random()))


def zero(file: Path, generator: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def remove(file: Path, generator: random.Random) -> None:
    file.unlink()


def fifo(file: Path, generator: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def kinds(run: Path) -> dict[str, list[Path]]:
    """The files of a run by kind: names without the numbers in them."""
    found = collections.defaultdict(list)
    for file in sorted(run.rglob("*")):
        if file.is_file() and file.stat().st_size:
            name = re.sub(r"[0-9a-f]{32}|\d+(\.\d+)*", "N", str(file.relative_to(run)))
            found[name].append(file)
    return found


def one_line(action):
    """The result of an action, or None if it ends in one line; anything else is a failure."""
    try:
        return action()
    except (UserError, OSError) as error:
        code, line = outcome(error)
        assert code == 2, line
        assert len(line.splitlines()) == 1
        return None


def check(runs: Runs, output: Path, damage, generator: random.Random, only: str = "") -> str:
    """Damages a file of a copy of the stopped run and uses the copy; returns what was damaged."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(runs.stopped, output)
    by_kind = kinds(output)
    kind = only or generator.choice(sorted(by_kind))
    file = generator.choice(by_kind[kind])
    damage(file, generator)
    what = f"{damage.__name__} {file.relative_to(output)}"
    signal.alarm(120)
    try:
        read = one_line(lambda: weights_of(open_source(str(output))))
        assert read is None or read in runs.weights, what
        one_line(lambda: best_step(output))
        result = one_line(lambda: olmoe_jax.train(runs.config(output)))
    finally:
        signal.alarm(0)
    if result is not None:
        assert result.finished
        expected, found = lines(runs.whole), lines(output)
        assert found.items() <= expected.items(), what
        assert (STEPS, "loss") in found, what
        assert exported_bytes(output) == exported_bytes(runs.whole), what
    return f"{what}: {'continued' if result else 'refused'}"


def lines(output: Path) -> dict[tuple[int, str], float]:
    """{(step, "loss" or "eval_loss"): value} of a run."""
    read = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): line[name]
        for line in read
        for name in ("loss", "eval_loss")
        if name in line
    }


@pytest.mark.parametrize(
    "number",
    [0, 1, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in range(2, 6))],
)
def test_a_bit(runs, tmp_path, number):
    check(runs, tmp_path / "run", flip, random.Random(number))


def test_a_fifo_in_a_checkpoint(runs, tmp_path):
    check(runs, tmp_path / "run", fifo, random.Random(0), "checkpoints/N/_CHECKPOINT_METADATA")


@pytest.mark.exhaustive
def test_200_bits(runs, tmp_path):
    generator = random.Random(SEED)
    results = [check(runs, tmp_path / "run", flip, generator) for _ in range(200)]
    print("\n".join(results))
    print(collections.Counter(result.rpartition(": ")[2] for result in results))


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", [cut, zero, remove, fifo])
def test_every_kind_of_file(runs, tmp_path, damage):
    generator = random.Random(SEED)
    for kind in sorted(kinds(runs.stopped)):
        print(check(runs, tmp_path / "run", damage, generator, kind))
