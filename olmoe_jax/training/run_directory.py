"""The output directory of a run: who may write into it, and what lies where.

OUTPUT_DIR/config.json      the resolved configuration
OUTPUT_DIR/checksums.json   of it and of experts.json; model/ and each checkpoint have their own
OUTPUT_DIR/model/           config.json, generation config and tokenizer files, for the export
OUTPUT_DIR/checkpoints/N/   Orbax checkpoint after N updates
OUTPUT_DIR/metrics.jsonl    a line per step and per evaluation
OUTPUT_DIR/tensorboard/     event files
OUTPUT_DIR/loss.png         the loss curve
OUTPUT_DIR/experts.json     the tuned experts, if the method tunes experts (ESFT: scores.*)
OUTPUT_DIR/hf/, hf_best/    exported Hugging Face checkpoints
OUTPUT_DIR/adapter/         a LoRA run's export instead: the PEFT adapter (and adapter_best/)
OUTPUT_DIR/damaged-N/       a checkpoint that is damaged, set aside (and damaged-metrics.jsonl)
OUTPUT_DIR/.lock            locked while a run writes there
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import xxhash

from olmoe_jax.checkpoints import checksums, directory, opening
from olmoe_jax.checkpoints.metrics import METRICS
from olmoe_jax.checkpoints.opening import CHECKPOINTS, EXPERTS
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY
from olmoe_jax.config import FIELDS, Config, first_difference, to_dict
from olmoe_jax.config.fields import show
from olmoe_jax.errors import UserError, os_reason
from olmoe_jax.files import open_regular, read_json
from olmoe_jax.parallel import distributed

CONFIG = "config.json"
LOSS_PLOT = "loss.png"
PARTIAL_MODEL = ".model.partial"
LOCK = ".lock"
UNFINISHED_START = {
    PARTIAL_MODEL,
    LOCK,
    f".{CONFIG}.partial",
    f".{checksums.FILE}.partial",
    checksums.FILE,
}
"""The files that a run leaves which was killed while it made its directory."""

FREE_FIELDS = {
    "train.resume",
    "train.output_dir",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.export_hf",
    "train.export_dtype",
    "train.export_best",
    "train.profile_steps",
    "train.wandb_project",
    "model.allow_extrapolation",
    "model.grouped_matmul",
    "model.attention",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "generate.every",
}
"""The fields that may change between a run and its continuation: they change no mathematics."""

LOCATIONS = {path for path, field in FIELDS.items() if field.is_place} - FREE_FIELDS
"""The fields that say where an input lies. A checkpoint's identity holds the inputs' content."""


def check(config: Config) -> None:
    """Refuses an output directory that this run must not write into. Leaves nothing behind.

    Raises:
      UserError: the directory holds another run (the message names the first field that differs),
        or something else.
    """
    output = Path(config.train.output_dir)
    directory.check_writable(output)
    if not _holds_files(output):
        return
    if not (output / CONFIG).exists():
        raise UserError(
            f"train.output_dir={output}: holds files but no run; write an empty or new directory"
        )
    if config.train.resume == "restart":
        if directory.is_fixed(output):
            raise UserError(
                f"train.resume=restart: {output} is a mount point, or the current directory or "
                "above it, and cannot be set aside; write another train.output_dir"
            )
        return
    if opening.steps(output):
        opening.check_files(output)
    difference = first_difference(
        _read_config(output), to_dict(config), ignore=FREE_FIELDS | LOCATIONS
    )
    if difference:
        raise UserError(
            f"train.output_dir={output} holds another run: {difference}; write another "
            "train.output_dir, or train.resume=restart to set the old run aside and start afresh"
        )


def _holds_files(output: Path) -> bool:
    """Returns whether a directory holds more than a start that was cut off leaves."""
    return output.exists() and any(e.name not in UNFINISHED_START for e in output.iterdir())


def stored_config(config: Config) -> dict[str, dict[str, Any]] | None:
    """Returns the stored configuration of the run that `config` continues; None: it begins."""
    output = Path(config.train.output_dir)
    if config.train.resume == "restart" or not opening.steps(output):
        return None
    return _read_config(output)


@contextlib.contextmanager
def opened(config: Config, write_model: Callable[[Path], None]) -> Iterator[Path]:
    """Makes the run's directory with its small files, or takes the existing one; locks it.

    Process 0 makes and locks it; the others wait. Yields the directory. `write_model` writes the
    files of model/, which the exports carry, into a directory.

    Raises:
      UserError: another run writes there, or the directory cannot be written.
    """
    output = Path(config.train.output_dir)
    lock = None
    if distributed.is_writer():
        lock = _create(config, output, write_model)
    try:
        distributed.barrier("output directory")
        if not (output / CONFIG).exists():
            raise UserError(
                f"train.output_dir={output}: process 0 made it, but another process cannot see it; "
                "write a directory that all processes share"
            )
        yield output
    finally:
        if lock:
            lock.close()


def _create(config: Config, output: Path, write_model: Callable[[Path], None]) -> TextIO:
    lock = _locked(output)
    if config.train.resume == "restart" and _holds_files(output):
        _set_aside(output)
        lock = _locked(output)
    # Until there is a checkpoint (be it a damaged one), nothing depends on the files of an earlier
    # attempt.
    if not any((output / CHECKPOINTS).glob("[0-9]*")):
        _write_small_files(output, config, write_model)
    return lock


def _locked(output: Path) -> TextIO:
    """Returns the locked file. The lock dies with the process; the file alone means nothing."""
    output.mkdir(parents=True, exist_ok=True)
    (output / LOCK).touch()
    with open_regular(output / LOCK):
        lock = (output / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise UserError(
            f"train.output_dir={output}: {owner} is running in it; wait until it has ended, or "
            "write another train.output_dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"note: {output} cannot be locked; start no second run in it")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _write_small_files(output: Path, config: Config, write_model: Callable[[Path], None]) -> None:
    model, partial = output / MODEL_DIRECTORY, output / PARTIAL_MODEL
    partial.mkdir(parents=True, exist_ok=True)
    write_model(partial)
    checksums.write(partial)
    for name in (checksums.FILE, EXPERTS):
        (output / name).unlink(missing_ok=True)
    write_run_config(output, config)
    shutil.rmtree(model, ignore_errors=True)
    partial.rename(model)


def write_run_config(output: Path, config: Config) -> None:
    """Writes the configuration of a run, in one piece and with its checksum."""
    values = to_dict(config)
    _locate(values, config)
    checksums.write_json(output / CONFIG, values)


def update_config(config: Config) -> list[str]:
    """Writes into the config.json of a continued run where things lie now, and its backend.

    Returns:
      A line for each thing that lay elsewhere.
    """
    output = Path(config.train.output_dir)
    values = _read_config(output)
    lines, backend = _locate(values, config), config.model.grouped_matmul
    if lines or values["model"].get("grouped_matmul") != backend:
        values["model"]["grouped_matmul"] = backend
        checksums.write_json(output / CONFIG, values)
    return lines


def _locate(values: dict[str, dict[str, Any]], config: Config) -> list[str]:
    """Sets the locations in `values` to those of `config`, absolute ones where they are paths."""
    lines = []
    for path in sorted(LOCATIONS):
        section, name = path.split(".")
        old, new = (
            place and FIELDS[path].absolute(place)
            for place in (values[section].get(name), getattr(getattr(config, section), name))
        )
        values[section][name] = new
        if new != old:
            lines.append(f"continues with {path}={show(new)} (was {show(old)}): same content")
    return lines


def _read_config(output: Path) -> dict[str, dict[str, Any]]:
    return read_json(dict[str, dict[str, Any]], output / CONFIG)


def _set_aside(output: Path) -> None:
    if output.name == "..":
        output = output.resolve()
    number = 1
    while (old := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    output.rename(old)
    print(f"train.resume=restart: the old run is now {old}")


def metrics_report(output: Path) -> dict[str, Any]:
    """Returns the size and the checksum of metrics.jsonl, for `rewind_metrics`."""
    content = (output / METRICS).read_bytes()
    return {"bytes": len(content), "xxh3_128": _checksum(content)}


def rewind_metrics(output: Path, report: dict[str, Any] | None) -> None:
    """Cuts metrics.jsonl back to its content at a checkpoint: a continued run does the rest again.

    Sets the file aside if the content is another: a run does not depend on it. `report` is what
    `metrics_report` returned; None: the run begins.
    """
    file, content = output / METRICS, b""
    if report is not None and file.exists():
        with open_regular(file) as stream:
            content = stream.read(report["bytes"])
        if _checksum(content) != report["xxh3_128"]:
            aside, content = output / f"damaged-{METRICS}", b""
            file.rename(aside)
            print(f"{file}: damaged, its checksum differs; it is now {aside}", flush=True)
    partial = output / f".{METRICS}.partial"
    partial.write_bytes(content)
    partial.replace(file)


def _checksum(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()


def write_error(output: Path, error: OSError) -> UserError:
    """Returns the error of a run that could not write; it names the checkpoint that is left."""
    saved = opening.steps(output)
    kept = f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint yet"
    return UserError(
        f"{error.filename or output}: {os_reason(error)}; {kept}; then run the same command again"
    )
