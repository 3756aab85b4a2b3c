"""Directories of checkpoints: finding one, its small files, and writing one in one piece."""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoe_jax import hub
from olmoe_jax.errors import UserError

MODEL_FILES = ("config.json", "generation_config.json")
CARD = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
ADAPTER_FILES = ("adapter_config.json", "expert_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    *TEMPLATE_FILES,
)


def resolve(path_or_hub_id: str) -> Path:
    """Returns a local directory as it is, or downloads a hub id (owner/name) to the hub's cache.

    Raises:
      UserError: as for `hub.directory_of`.
    """
    patterns = ["*.safetensors", "*.safetensors.index.json", *MODEL_FILES, *TOKENIZER_FILES]
    patterns += [*ADAPTER_FILES, CARD, *LICENSE_FILES]
    return hub.directory_of(path_or_hub_id, patterns)


def write_json(file: Path, value: Any) -> None:
    """Writes indented JSON in one piece: a reader sees the old file or the new one."""
    partial_json(file, value).replace(file)


def partial_json(file: Path, value: Any) -> Path:
    """Writes indented JSON beside a file; returns the path, which is to replace the file."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return partial


def copy_files(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    """Copies the named files, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            # An error of shutil.copyfile names the source, whichever of the two it is about.
            (destination / name).write_bytes((source / name).read_bytes())


@contextlib.contextmanager
def new_directory(output: str | Path) -> Iterator[Path]:
    """Makes a directory that appears under its name when the block ends without an error.

    Yields:
      The directory to write into, under another name until then. An error removes it.

    Raises:
      UserError: something is there already, or what is there cannot be replaced.
      OSError: the directory cannot be made, before the block, or written.
    """
    output = Path(output)
    if output.is_symlink() and output.is_dir():
        output = output.resolve()  # the link stays, and what it leads to is made
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; write another --output or remove it")
    if output.is_dir() and is_fixed(output):
        raise UserError(
            f"{output}: a mount point, or the current directory, cannot be replaced by the "
            "finished directory; write a new one in it"
        )
    partial = _partial(output)
    missing = [parent for parent in partial.parents if not parent.exists()]
    try:
        with _named(output, partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if output.exists():
                output.rmdir()
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # there is no error: the parent holds the output
                parent.rmdir()


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Makes a file that appears under its name when the block ends without an error.

    Yields:
      The file to write, under another name until then. An error removes it.

    Raises:
      OSError: the file cannot be made, before the block, or written.
    """
    with contextlib.suppress(FileNotFoundError):
        # A device or a FIFO would be replaced by a file.
        if not stat.S_ISREG(file.stat().st_mode):
            code = errno.EISDIR if file.is_dir() else errno.EEXIST
            raise OSError(code, os.strerror(code), str(file))
    partial = _partial(file)
    with _named(file, partial):
        partial.touch()
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(output: Path) -> None:
    """Raises the OSError that making the directory `output` would raise. Leaves nothing behind."""
    existing = output
    while not os.path.lexists(existing):
        existing = existing.parent
    with (
        _named(output, existing),
        tempfile.TemporaryDirectory(prefix=".olmoe_jax-", dir=existing) as probe,
    ):
        (Path(probe) / output.relative_to(existing)).mkdir(parents=True, exist_ok=True)


def is_fixed(path: Path) -> bool:
    """Returns whether a directory must keep its name: a mount point, this process's or above it."""
    here = Path.cwd()
    return os.path.ismount(path) or path.resolve() in (here, *here.parents)


def _partial(path: Path) -> Path:
    """Returns the name, beside `path`, under which it is written."""
    path = path.absolute()
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def _named(path: Path, partial: Path) -> Iterator[None]:
    """Gives an OSError that names no file, or one of `partial`, the name that the user knows."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(partial)):
            error.filename = str(path)
        raise
