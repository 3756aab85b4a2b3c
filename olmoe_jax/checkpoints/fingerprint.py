"""Fingerprints of models, from their content, without reading all of it."""

import hashlib
from pathlib import Path

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.opening import CHECKPOINTS, is_run, latest_step
from olmoe_jax.checkpoints.orbax import PARAMETERS
from olmoe_jax.checkpoints.peft import CONFIG_FILE, WEIGHTS_FILE, adapter_directory, router_file
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY

_PIECES, _PIECE = 16, 1 << 16
_HF_FILES = ("*.safetensors", "config.json", "tokenizer.json")
_OUR_FILES = (f"{PARAMETERS}/**/*", f"{MODEL_DIRECTORY}/*")


def model_fingerprint(path_or_hub_id: str) -> str:
    """Returns a hash of a checkpoint's file names and sizes, and of pieces of each file.

    The pieces are of 64 KiB: the whole file up to 1 MiB, else 16 or 17, evenly spread. A training
    run's latest checkpoint counts, since that one is loaded.

    Raises:
      UserError: there is no such checkpoint.
    """
    root = directory.resolve(path_or_hub_id)
    patterns = _OUR_FILES if (root / PARAMETERS).is_dir() else _HF_FILES
    if is_run(root):
        root, patterns = root / CHECKPOINTS / str(latest_step(root)), ("**/*",)
    return _fingerprint(root, {file for pattern in patterns for file in root.glob(pattern)})


def adapter_fingerprint(path_or_hub_id: str) -> str:
    """Returns such a hash of an adapter; of a LoRA run, of the adapter that the run exported.

    Raises:
      UserError: there is no such adapter.
    """
    root = adapter_directory(path_or_hub_id)
    files = {root / CONFIG_FILE, root / WEIGHTS_FILE, router_file(root)}
    return _fingerprint(root, {file for file in files if file})


def _fingerprint(root: Path, files: set[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}\n".encode())
            with file.open("rb") as opened:
                for start in range(0, size, max(_PIECE, size // _PIECES)):
                    opened.seek(start)
                    digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]
