"""Loading of data sets from the Hugging Face hub; code on the hub is never run."""

import functools
import re
import sys
from typing import TYPE_CHECKING

from olmoe_jax import hub
from olmoe_jax.data.fields import AvoidableError

if TYPE_CHECKING:
    import datasets


@functools.lru_cache(maxsize=4)
def load_from_hub(path: str, split: str, config: str | None) -> "datasets.Dataset":
    """Returns a data set of the hub, downloaded or from the cache.

    Without the hub, it comes from the cache of `datasets`, or from files that `hf download` left in
    the hub's cache.

    Args:
      path: owner/name, or owner/name:file, of which the file is read whole.
      split: the split, or a slice of one, as train[:10%].
      config: the configuration; None: the default or the only one.

    Raises:
      UserError: the hub does not give the data set, or it lacks the split or the configuration.
    """
    name, _, file = path.partition(":")
    with hub.downloading(path, "dataset"):
        import datasets

        show = datasets.enable_progress_bars if sys.stderr.isatty() else None
        (show or datasets.disable_progress_bars)()
        try:
            # The hub's library loads a named file as the only split and calls the split train.
            if not file:
                return _by_name(name, split, config)
            return datasets.load_dataset(name, data_files=file, split="train")
        # Errors of the hub are ValueErrors too.
        except (AssertionError, RuntimeError, ValueError) as error:
            if found := _reason(str(error), None if file else split, config):
                raise AvoidableError(f"{path}: {found[0]}", found[1]) from None
            raise


def _by_name(name: str, split: str, config: str | None) -> "datasets.Dataset":
    import datasets
    import huggingface_hub

    try:
        return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        try:
            files = huggingface_hub.snapshot_download(
                name, repo_type="dataset", local_files_only=True
            )
        except (OSError, ValueError):
            raise error from None
    return datasets.load_dataset(files, config, split=split)


_CONFIG = ", or config=NAME (data.hub_config)"
_SPLIT = ", or split=NAME (data.split)"
_REASONS = {
    r"scripts are no longer supported, but found (.*)": (
        "it is made by a script, {0}, and code of the hub is never run; write OWNER/NAME:FILE if "
        "the rows lie there as a file, or convert them",
        "",
    ),
    r"Config name is missing.*?\[(.*?)\]": (
        "it has several configurations, {0}; write OWNER/NAME:FILE",
        _CONFIG,
    ),
    r"BuilderConfig '.*' not found\. Available: \[(.*?)\]": (
        "it has no configuration {config}, but {0}; write OWNER/NAME:FILE",
        _CONFIG,
    ),
    r"There are multiple .* configurations in the cache: (.*?)\n": (
        "the cache has several configurations of it, {0}; write OWNER/NAME:FILE",
        _CONFIG,
    ),
    r"Available configs in the cache: \[(.*?)\]": (
        "the cache has no configuration {config} of it, but {0}; write one of them, or connect to "
        "the hub",
        "",
    ),
    r"(?:Unknown split|Bad split).*\[(.*)\]": (
        "it has no split {split}, but {0}; write OWNER/NAME:FILE",
        _SPLIT,
    ),
    r"^Requested slice": (
        "it has fewer rows than the slice {split} names; write a shorter one",
        "",
    ),
    r"^(?:Unrecognized instruction|Percent slice|There are only|It's not possible)": (
        "{split} is no slice of a split; write as train[:10%] or train[100:200]",
        "",
    ),
}
"""Errors of `datasets` (patterns), what to say, and what to add where options name the part."""


def _reason(message: str, split: str | None, config: str | None) -> tuple[str, str] | None:
    if "find cache" in message and not split:
        return "the hub does not give this file, and the cache does not have it; check the name", ""
    for pattern, (words, option) in _REASONS.items():
        if found := re.search(pattern, message, re.DOTALL):
            quoted = [group.replace("'", "") for group in found.groups()]
            return words.format(*quoted, split=split, config=config), option
    return None
