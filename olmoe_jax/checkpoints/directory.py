"""Directories of checkpoints: finding one, its small files, and writing one in one piece."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olmoe_jax.errors import UserError

MODEL_FILES = ("config.json", "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "expert_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def resolve(path_or_hub_id: str) -> Path:
    """Returns a local directory as it is, or downloads a hub id (owner/name) to the hub's cache.

    Raises:
      UserError: there is no such directory, or the hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    is_hub_id = path_or_hub_id.count("/") == 1 and path_or_hub_id[0] not in "./~"
    if path.exists() or not is_hub_id:
        raise UserError(f"{path_or_hub_id}: no such directory; write a directory or a hub id")
    import huggingface_hub

    patterns = ["*.safetensors", "*.safetensors.index.json", *MODEL_FILES, *TOKENIZER_FILES]
    patterns += ADAPTER_FILES
    try:
        return Path(huggingface_hub.snapshot_download(path_or_hub_id, allow_patterns=patterns))
    except Exception as error:
        reason = type(error).__name__
        raise UserError(
            f"{path_or_hub_id}: no such directory here, and the hub did not give it ({reason}); "
            "check the name and the network, or write a local directory"
        ) from None


def write_json(file: Path, value: Any) -> None:
    """Writes indented JSON in one piece: a reader sees the old file or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def copy_files(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    """Copies the named files, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


@contextlib.contextmanager
def new_directory(output: str | Path) -> Iterator[Path]:
    """Makes a directory that appears under its name when the block ends without an error.

    Yields:
      The directory to write into, under another name until then. An error removes it.

    Raises:
      UserError: something is there already, or the disk is full.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; write another --output or remove it")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot write ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `file`, then renames it to `file`.

    Raises:
      UserError: the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        write(partial)
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot write ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
