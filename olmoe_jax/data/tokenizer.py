"""Loading of a tokenizer from a directory or from the hub."""

import os
from typing import TYPE_CHECKING

from olmoe_jax.data.hub import first_line, is_hub_id, is_written_as_path, quiet_hub
from olmoe_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer in a local directory or of a hub id; code on the hub is never run.

    Raises:
      UserError: there is no tokenizer, it is not a fast one (with a tokenizer.json), or it has no
        end-of-text token.
    """
    if is_written_as_path(path) and not os.path.isdir(path):
        raise UserError(
            f"no tokenizer directory at {path}: give a directory with tokenizer.json "
            "and tokenizer_config.json, or a hub id such as allenai/OLMoE-1B-7B-0125"
        )
    if not os.path.isdir(path) and not is_hub_id(path):
        raise UserError(f"{path} is neither a tokenizer directory nor a hub id (owner/name)")
    with quiet_hub():
        # This class takes tokenizer.json as it is. AutoTokenizer may build the tokenizer anew, and
        # imports torch where torch is installed, which takes longer than all else here.
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        # transformers raises OSError, ValueError, TypeError, KeyError and more.
        except Exception as error:
            raise UserError(
                f"cannot load a tokenizer from {path} ({first_line(error)}): give a directory with "
                "tokenizer.json and tokenizer_config.json, or a hub id that can be reached"
            ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} has no tokenizer.json: convert it to a fast one")
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-text token: "
            'set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer
