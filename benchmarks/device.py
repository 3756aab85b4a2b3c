"""Measures what a device can do: python -m benchmarks.device --minutes 8 --output DIR

The parts run in order of worth, each in a process of its own, until the time is up. Every row is
written as it comes, to DIR/results.jsonl, and so is DIR/page.md, a page for docs/devices/. An error
or a crash is that part's result, and the others go on. docs/devices/README.md says what is needed.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.device_parts import STEPS, Row, parse_row
from benchmarks.shapes import SHAPES
from olmoe_jax.errors import ArgumentParser, UserError, run_command, shorten
from olmoe_jax.root import ROOT

RESULTS, PAGE = "results.jsonl", "page.md"
SHORTEST = 10
"""Seconds that must be left for a part to begin."""
LIMIT, TRIAL_LIMIT = 180, 900
"""Seconds of a part at most: one that hangs leaves time for the others. A CPU may be slow."""
ENVIRONMENT = {
    # Three quarters, jax's default, are too few for the full state on a GPU of 80 GB.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "CUDA_VISIBLE_DEVICES": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "HF_HUB_OFFLINE": "1",
}
TRIAL = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""The tiny shape tries the parts themselves, on a CPU: its times mean nothing."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A process that prints rows."""

    name: str  # one or two words
    section: str  # the heading of the page under which its rows stand
    command: tuple[str, ...]  # without the flag `--directory`, which names the output
    limit: int  # seconds after which the process is stopped


def parts(shape: str) -> list[Part]:
    """Returns all parts, in order of worth."""

    def part(name: str, section: str, *flags: str) -> Part:
        command = (sys.executable, "-m", "benchmarks.device_parts", name.split()[0], *flags)
        limit = TRIAL_LIMIT if shape == "tiny" else LIMIT
        return Part(name, section, (*command, f"--shape={shape}"), limit)

    def proofs(*backends: str) -> list[Part]:
        return [part(f"proofs {name}", "Kernels", f"--backend={name}") for name in backends]

    def step(name: str, *flags: str) -> Part:
        return part(f"step {name}", "Training steps", *flags)

    # More rows are the same program again: on a trial one kind shows that they work.
    rows = {kind: ("--rows=1",) for kind in STEPS if shape == "tiny" and kind != "densemixer"}
    steps = [step(kind, f"--kind={kind}", *rows.get(kind, ())) for kind in STEPS]
    remat = [step(kept, "--rows=1", f"--remat={kept}") for kept in ("selective", "none")]
    plain = {
        "machine": "Machine",
        "golden": "Golden cases",
        "matmul": "Matmul",
        "plan": "Memory against plan",
        "decoding": "Decoding",
        "first_step": "First step",
        "resume": "Resume",
    }
    one = {name: part(name, section) for name, section in plain.items()}
    # First the kernels that are a platform's default; pallas_triton is attention's, too.
    return [
        *(one["machine"], *proofs("mosaic", "pallas_triton", "splash", "ragged_dot")),
        *(one["golden"], one["matmul"], *steps, one["plan"]),
        *(*proofs("blocked", "chunked", "cudnn", "tokamax"), *remat),
        *(one["decoding"], one["first_step"], one["resume"]),
    ]


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="time for all parts together")
    parser.add_argument("--output", type=Path, required=True, help="a directory without results")
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument(
        "--parts", nargs="+", metavar="NAME", help="these alone; a first word names several"
    )
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        raise UserError(f"--minutes={args.minutes}: must be positive")
    end, chosen = time.monotonic() + 60 * args.minutes, parts(args.shape)
    if args.parts:
        names = {word for part in chosen for word in (part.name, part.name.split()[0])}
        if unknown := set(args.parts) - names:
            raise UserError(f"--parts {min(unknown)}: no such part; there are {', '.join(names)}")
        chosen = [p for p in chosen if {p.name, p.name.split()[0]} & {*args.parts}]
    args.output.mkdir(parents=True, exist_ok=True)
    if (args.output / RESULTS).exists():
        raise UserError(f"--output={args.output}: holds results; write another directory")
    # `timeout` ends a command so: the process that runs must go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Results(args.output, chosen, args.shape == "tiny") as results:
        for part in chosen:
            left = end - time.monotonic()
            if part.name.startswith("proofs") and not results.may_run(part.name.split()[1]):
                results.ended(part, "not on this machine", 0)
                continue
            if left < SHORTEST:
                results.ended(part, "not reached", 0)
                continue
            start = time.monotonic()
            outcome = run(part, min(part.limit, left), results)
            results.ended(part, outcome, time.monotonic() - start)


class Results:
    """Keeps the rows found so far: on disk, on the page and on the screen."""

    def __init__(self, output: Path, chosen: Sequence[Part], trial: bool):
        self.output, self.chosen, self.trial = output, chosen, trial
        self.rows: dict[str, list[Row]] = {}
        self.outcomes: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> "Results":
        self.file: TextIO = (self.output / RESULTS).open("x")
        self.write_page()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def found(self, part: Part, row: Row) -> None:
        """Keeps a row."""
        self.rows.setdefault(part.section, []).append(row)
        text = ", ".join(f"{name} {show(value)}" for name, value in row.items())
        self._keep({"part": part.name, "row": row}, f"{part.name}: {text}")

    def ended(self, part: Part, outcome: str, seconds: float) -> None:
        """Keeps how a part ended."""
        self.outcomes[part.name] = outcome, seconds
        record = {"part": part.name, "outcome": outcome, "seconds": round(seconds, 1)}
        self._keep(record, f"{part.name}: {outcome}, {seconds:.1f} s")

    def may_run(self, backend: str) -> bool:
        """Returns whether a backend runs here, as far as the machine part has said."""
        found = {row["what"]: row["found"] for row in self.rows.get("Machine", ())}
        names = [text for what, text in found.items() if what.endswith("backends")]
        return not names or backend in ", ".join(names).split(", ")

    def _keep(self, record: dict[str, Any], line: str) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.write_page()
        print(line, flush=True)

    def write_page(self) -> None:
        """Writes the page, in one piece."""
        partial = self.output / f".{PAGE}.partial"
        partial.write_text("\n".join(self._page()) + "\n")
        partial.replace(self.output / PAGE)

    def _page(self) -> Iterator[str]:
        machine = {row["what"]: row["found"] for row in self.rows.get("Machine", ())}
        yield f"# {machine.get('devices', 'A device')}"
        for section, rows in self.rows.items():
            yield from ("", f"## {section}", "")
            yield from table(rows)
        yield from ("", "## Parts", "")
        ended = [
            {"part": part.name, "outcome": outcome, "s": seconds}
            for part in self.chosen
            for outcome, seconds in [self.outcomes.get(part.name, ("not reached", 0.0))]
        ]
        yield from table(ended)


def run(part: Part, limit: float, results: Results) -> str:
    """Runs a part and keeps its rows. Returns how the part ended."""
    log = results.output / f"{part.name.replace(' ', '-')}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*part.command, f"--directory={results.output}"],
            cwd=ROOT,
            env=ENVIRONMENT | (TRIAL if results.trial else {}) | os.environ,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        late = threading.Timer(limit, _kill, (process,))
        late.start()
        try:
            for line in process.stdout or ():
                if row := parse_row(line):
                    results.found(part, row)
                else:
                    print(line, end="", flush=True)
            code = process.wait()
        finally:
            over = late.finished.is_set()
            late.cancel()
            _kill(process)
    if code == 0:
        return "done"
    if over:
        return f"stopped after {limit:.0f} s"
    said = log.read_text(errors="replace").strip().splitlines()
    reason = shorten(said[-1], 300) if said else "no message"
    return f"failed with {code}: {reason}"


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of a Markdown table with all columns of the rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield f"| {' | '.join(columns)} |"
    yield "| --- " * len(columns) + "|"
    for row in rows:
        cells = (show(row.get(name, "")).replace("|", "\\|") for name in columns)
        yield f"| {' | '.join(cells)} |"


def show(value: Any) -> str:
    """Returns a value as a reader wants it: three digits, yes and NO."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    run_command(main)
