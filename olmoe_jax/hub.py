"""The Hugging Face hub: its ids, downloads, and the reason why one fails."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from olmoe_jax.errors import UserError, first_line

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Returns True if `name` has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def is_written_as_path(name: str) -> bool:
    """Returns True if `name` can only mean a local file or directory."""
    return name.startswith((".", "/")) or os.path.exists(name)


def directory_of(path_or_hub_id: str, patterns: Sequence[str]) -> Path:
    """Returns a local directory as it is, or downloads a hub id to the hub's cache.

    Args:
      path_or_hub_id: a directory, or owner/name.
      patterns: the files to download.

    Raises:
      UserError: there is no such directory, or the hub does not give it; the message says why.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if is_written_as_path(path_or_hub_id) or not is_hub_id(path_or_hub_id):
        raise UserError(f"{path_or_hub_id}: no such directory; write a directory or a hub id")
    with downloading(path_or_hub_id):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(path_or_hub_id, allow_patterns=patterns))


@contextlib.contextmanager
def downloading(path: str, kind: str = "model") -> Iterator[None]:
    """Raises an error of the hub's libraries as a `UserError` with the hub's reason.

    Args:
      path: owner/name, or owner/name:file.
      kind: "model" or "dataset".
    """
    import huggingface_hub.utils.logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the log of retries
    try:
        yield
    except UserError:
        raise
    # The libraries raise errors of many unrelated types.
    except Exception as error:
        raise UserError(
            f"{path}: no such path here, and the Hugging Face hub did not give it: "
            f"{reason(error, path.partition(':')[0], kind)}"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def reason(error: Exception, repository: str, kind: str) -> str:
    """Returns why a download failed, and what to do about it."""
    import huggingface_hub

    failed: Exception | None = None
    try:
        # `datasets` and the errors of the cache name no cause: ask the hub itself.
        huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=10)
    except Exception as cause:
        failed = cause
    deepest: BaseException = failed or error
    while True:
        for name, words in _REASONS.items():
            if isinstance(deepest, getattr(huggingface_hub.errors, name)):
                return words
        if deepest.__cause__ is None:
            break
        deepest = deepest.__cause__
    if failed:
        return f"it cannot be reached ({first_line(deepest)}); check the network"
    return f"{first_line(error)}; check the id"


_REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache does not have it; unset it, or "
    "write a local path",
    "GatedRepoError": "its owner gives access on request; ask on its page, then `hf auth login`",
    "RepositoryNotFoundError": "it does not exist or is private; check the id, or `hf auth login`",
    "RevisionNotFoundError": "it has no such revision; check the id",
    "RemoteEntryNotFoundError": "it has no such file; check the name",
}
"""Errors of huggingface_hub, the more special ones first."""
