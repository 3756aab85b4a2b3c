"""Whatever happens to a run, the same command ends it as if nothing had, or says what is wrong.

pytest -m slow tests/faults prints at the end how many faults were injected and survived. CI kills
runs; of the other faults it has the tests in one process: training/test_training_resume.py,
test_training_nonfinite.py, data/test_data_tokenized.py.
"""

import datetime
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import processes
from training.test_training_resume import assert_same_run
from training.tiny_run import losses

pytestmark = pytest.mark.slow

STEPS, STEPS_PER_EPOCH = 12, 4
OPTIONS = {
    "data__max_seq_length": 48,
    "train__epochs": 3,
    "train__rows_per_device": 4,
    "train__checkpoint_every": 2,
}


def arguments(sums, output: Path, **changes) -> list[str]:
    return sums.arguments(output, **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def whole(sums, nursery, tmp_path_factory):
    """Where a run lies that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    code, said = nursery.run(arguments(sums, directory / "run"), directory / "log")
    assert code == 0, said
    assert len(losses(directory / "run")) == STEPS
    return directory / "run"


@pytest.fixture
def finish(sums, nursery, whole, tmp_path):
    """Runs the command to its end, checks that it is the undisturbed run, returns what it says."""

    def run(output: Path, **changes) -> str:
        log = tmp_path / "finish.log"
        code, said = nursery.run(arguments(sums, output, **changes), log)
        assert code == 0, said
        assert_same_run(output, whole)
        return said

    return run


def wait_for(condition, process) -> bool:
    """Until the condition holds; False: the process ended first."""
    while process.is_alive():
        if condition():
            return True
        time.sleep(0.001)
    return False


def saved(output: Path) -> list[int]:
    found = (output / "checkpoints").glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def saving(output: Path) -> set[Path]:
    """Checkpoints that are being written, or were when an earlier process was killed."""
    return {path for path in (output / "checkpoints").glob("*tmp*") if path.is_dir()}


def reported(output: Path) -> tuple[int, int]:
    """Changes with every line of metrics.jsonl."""
    try:
        status = (output / "metrics.jsonl").stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_size


@pytest.fixture
def interrupted(sums, nursery, tmp_path):
    """A run that was killed when it had two checkpoints."""
    output = tmp_path / "run"
    process = nursery.start(arguments(sums, output), tmp_path / "log")
    assert wait_for(lambda: len(saved(output)) == 2, process), (tmp_path / "log").read_text()
    process.kill()
    process.join()
    return output


def last_step(output: Path) -> int:
    """The step of the last line of metrics.jsonl; 0 while there is none."""
    try:
        return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


LATEST = {
    "start": 2.0,
    "compile": 1.0,
    "step": 0.3,
    "save": 0.03,
    "evaluation": 0.05,
    "export": 0.3,
}
"""When a kill falls, in seconds after the process has come to this part, at the latest."""


def killed_again_and_again(start, output: Path, whole: Path, seed: int, kills: int, count):
    """Kills a run in each part in turn, then lets the run finish and compares it with `whole`.

    A generator, so that two runs can be killed side by side: yields while it waits, returns how
    many of its kills fell into a save.
    """
    generator, killed, in_a_save = random.Random(seed), 0, 0
    log = output.with_suffix(".log")
    while killed < kills:
        before, leftovers = reported(output), saving(output)
        said = log.stat().st_size if log.exists() else 0
        process = start(output)
        part = list(LATEST)[killed % len(LATEST)]
        seconds = generator.uniform(0.0, LATEST[part])

        def reached(part=part, before=before, leftovers=leftovers, said=said) -> bool:
            new = reported(output) != before
            return {
                "start": lambda: True,
                # The introduction ends with the steps; then the first step is compiled.
                "compile": lambda: log.exists() and b"\nsteps: " in log.read_bytes()[said:],
                "step": lambda: new,
                "save": lambda: saving(output) and not leftovers,
                "evaluation": lambda: new and last_step(output) % STEPS_PER_EPOCH == 0,
                "export": lambda: new and STEPS in saved(output),
            }[part]()

        end = math.inf
        while process.is_alive() and time.monotonic() < end:
            # The next process removes them, and gives its own the same names.
            leftovers &= saving(output)
            if end == math.inf and reached():
                end = time.monotonic() + seconds
            yield
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            count(f"SIGKILL, {part}", injected=1)
            in_a_save += bool(saving(output) and not leftovers)
        else:
            assert process.exitcode == 0
            assert_same_run(output, whole)
            # It was faster than the kill: begin again.
            shutil.rmtree(output)
    process = start(output)
    while process.is_alive():
        yield
    assert process.exitcode == 0
    assert_same_run(output, whole)
    for number in range(kills):
        count(f"SIGKILL, {list(LATEST)[number % len(LATEST)]}", survived=1)
    return in_a_save


@pytest.mark.parametrize(
    ("runs", "kills"), [(1, 6), pytest.param(2, 25, marks=pytest.mark.exhaustive)]
)
def test_kills_in_every_part_of_a_run(sums, nursery, whole, tmp_path, count, runs, kills):
    """At the start, while compiling, in a step, a save, an evaluation and the export."""

    def start(output):
        return nursery.start(arguments(sums, output), output.with_suffix(".log"))

    in_a_save = [0] * runs

    def kill(seed):
        output = tmp_path / f"run{seed}"
        run = killed_again_and_again(start, output, whole, seed, kills, count)
        in_a_save[seed] = yield from run

    for _ in itertools.zip_longest(*map(kill, range(runs))):
        time.sleep(0.001)
    print(f"{runs * kills} kills, {sum(in_a_save)} of them during a save")
    assert sum(in_a_save) >= runs * kills // len(LATEST) // 2


@pytest.mark.exhaustive
def test_sigterm(sums, nursery, finish, tmp_path, count):
    output = tmp_path / "run"
    process = nursery.start(arguments(sums, output), tmp_path / "log")
    assert wait_for(lambda: reported(output)[1] > 0, process)
    count("SIGTERM", injected=1)
    process.terminate()
    process.join(300)
    assert process.exitcode == 0
    assert "the same command continues the run" in (tmp_path / "log").read_text()
    finish(output)
    count("SIGTERM", survived=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_latest_checkpoint(interrupted, finish, seed, count):
    """Files of it, chosen at random, lose their ends."""
    first, latest = saved(interrupted)[-2:]
    files = sorted(p for p in (interrupted / "checkpoints" / str(latest)).rglob("*") if p.is_file())
    generator = random.Random(seed)
    for file in generator.sample(files, max(1, len(files) // 2)):
        os.truncate(file, int(file.stat().st_size * generator.random()))
    count("damaged checkpoint", injected=1)
    said = finish(interrupted)
    assert f"the checkpoint of step {latest} cannot be read" in said
    assert f"going back to step {first}" in said
    count("damaged checkpoint", survived=1)


@pytest.mark.exhaustive
def test_a_truncated_data_cache(sums, interrupted, finish, count):
    caches = list(Path(os.environ["OLMOE_JAX_CACHE"]).rglob("tokens"))
    assert len(caches) >= 2  # training and evaluation
    for tokens in caches:
        os.truncate(tokens, tokens.stat().st_size // 2)
    count("truncated data cache", injected=1)
    finish(interrupted)
    count("truncated data cache", survived=1)


@pytest.mark.exhaustive
def test_a_data_file_changed_between_runs(sums, interrupted, nursery, finish, tmp_path, count):
    content = sums.train.read_text()
    count("changed data file", injected=1)
    try:
        sums.train.write_text(content.replace("+", "-", 1))
        code, said = nursery.run(arguments(sums, interrupted), tmp_path / "changed.log")
    finally:
        sums.train.write_text(content)
    assert code == 2
    assert "is of other training data" in said
    finish(interrupted)
    count("changed data file", survived=1)


@pytest.mark.exhaustive
def test_a_second_run_in_the_directory(sums, nursery, finish, tmp_path, count):
    output = tmp_path / "run"
    first = nursery.start(arguments(sums, output), tmp_path / "first.log")
    assert wait_for(lambda: reported(output)[1] > 0, first)
    os.kill(first.pid, signal.SIGSTOP)
    count("second run", injected=1)
    code, said = nursery.run(arguments(sums, output), tmp_path / "second.log")
    os.kill(first.pid, signal.SIGCONT)
    first.join(900)
    assert code == 2
    assert f"process {first.pid} on " in said
    assert first.exitcode == 0
    finish(output)
    count("second run", survived=1)


def not_a_number() -> None:
    """The loss weights of step 5 become NaN."""
    from olmoe_jax.data import TrainingData

    original = TrainingData._step

    def step(self, index, examples):
        made = original(self, index, examples)
        if index == 4:
            for batch in made.batches:
                batch.loss_weights[:] = float("nan")
        return made

    TrainingData._step = step


@pytest.mark.exhaustive
def test_nan_in_a_batch(sums, nursery, tmp_path, count):
    output = tmp_path / "run"
    count("NaN in a batch", injected=1)
    code, said = nursery.run(arguments(sums, output), tmp_path / "log", not_a_number)
    assert code == 0, said
    assert "step 5: loss or gradient is not finite; update skipped (1 in this run)" in said
    curve = losses(output)
    assert [step for step, loss in curve.items() if loss is None] == [5]
    assert curve[STEPS] < curve[1]
    count("NaN in a batch", survived=1)


def jumping_clock(days: int) -> None:
    """The wall clock is so many days off, and a day more or less at every reading."""
    generator = random.Random(days)
    right, right_ns = time.time, time.time_ns

    def off():
        return 86400 * (days + generator.choice([-1, 0, 1]))

    time.time = lambda: right() + off()
    time.time_ns = lambda: right_ns() + 10**9 * off()

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    datetime.datetime = Jumping


@pytest.mark.exhaustive
def test_clock_jumps(sums, nursery, whole, tmp_path, count):
    """Within three runs, and from each to the next: a week forward, back, and the right time.

    Files are as old as the wrong clock says.
    """
    output, log = tmp_path / "run", tmp_path / "log"
    for days in (7, -7):
        count("clock jump", injected=1)
        before, hook = saved(output), functools.partial(jumping_clock, days)
        process = nursery.start(arguments(sums, output), log, hook)
        reached = wait_for(lambda before=before: saved(output) != before, process)
        process.terminate()
        process.join(60)
        process.kill()
        said = log.read_text()
        assert reached, said
        assert process.exitcode == 0, said
        assert "the same command continues the run" in said
        then = time.time() + 86400 * days
        for path in output.rglob("*"):
            if path.stat().st_mtime > time.time() - 3600:
                os.utime(path, (then, then))
    code, said = nursery.run(arguments(sums, output), log)
    assert code == 0, said
    assert said.count("continuing after step") == 2
    assert_same_run(output, whole)
    count("clock jump", survived=2)


@pytest.fixture
def read_only(tmp_path):
    """A directory that nobody can write to, root included; None where we cannot make one."""
    directory = tmp_path / "read_only"
    directory.mkdir(mode=0o555)
    if not os.access(directory, os.W_OK):
        yield directory
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield directory if mounted else None
    if mounted:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.exhaustive
def test_a_read_only_output(sums, nursery, read_only, tmp_path, count):
    if read_only is None:
        pytest.skip("root writes everywhere, and may not mount here")
    count("read-only output", injected=1)
    code, said = nursery.run(arguments(sums, read_only / "run"), tmp_path / "log")
    assert code == 2
    assert said.count("\n") == 1
    assert f"error: {read_only / 'run'}: " in said
    count("read-only output", survived=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_of_two_is_killed(sums, tmp_path, environment, count, victim):
    """The other ends within a minute and says why; the same command continues."""
    output = tmp_path / "run"
    options = {"train__rows_per_device": 2, "train__epochs": 25, "train__max_steps": 100}
    command = [sys.executable, "train.py", *arguments(sums, output, **options)]
    extra = [["--heartbeat_timeout=10"]] * 2
    both = processes.start(command, tmp_path / "log", environment, extra=extra)
    while len(saved(output)) < 2:
        assert both.started[victim].poll() is None, both.output()
        time.sleep(0.01)
    count("one process of two killed", injected=1)
    both.started[victim].kill()
    killed = time.monotonic()
    code = both.started[1 - victim].wait(60)
    seconds = time.monotonic() - killed
    said = both.output()[1 - victim]
    print(f"process {victim} killed: the other ended after {seconds:.1f} s with code {code}")
    assert code not in (0, 2)
    # Of the death of process 0, jax may be the first to know.
    assert "the same command continues" in said or "another task died" in said
    again = processes.start(command, tmp_path / "again", environment, extra=extra)
    assert again.wait() == [0, 0], again.output()
    assert "continuing after step" in again.output()[0]
    assert len(losses(output)) == 100
    count("one process of two killed", survived=1)
