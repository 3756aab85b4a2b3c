"""Loading of a tokenizer from a directory or from the hub."""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from olmoe_jax import hub
from olmoe_jax.checkpoints.directory import TOKENIZER_FILES
from olmoe_jax.errors import UserError, first_line
from olmoe_jax.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1 << 62
_ONE_AT_A_TIME = threading.RLock()


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer in a local directory or of a hub id; code on the hub is never run.

    What the tokenizer's library raises when the tokenizer is used is a `UserError` too.

    Raises:
      UserError: there is no tokenizer, a file of it is wrong, it is not a fast one (with a
        tokenizer.json), or it has no end-of-text token.
    """
    directory = hub.directory_of(path, TOKENIZER_FILES)
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    read_json(dict[str, Any], file)
    if os.path.lexists(settings):
        read_json(dict[str, Any], settings)
    # Without torch, which the project does not need, importing transformers gives advice.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # This class takes tokenizer.json as it is. AutoTokenizer may build the tokenizer anew, and
    # imports torch where torch is installed, which takes longer than all else here.
    from transformers import PreTrainedTokenizerFast

    class Tokenizer(PreTrainedTokenizerFast):
        """The library's tokenizer with errors that name the file."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _library_errors(file):
                return super().__call__(*args, **kwargs)

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            with _library_errors(file):
                return super().decode(*args, **kwargs)

    try:
        # No use has a limit of the tokenizer's own, and the files' may be of any type.
        with _library_errors(file):
            tokenizer = Tokenizer.from_pretrained(str(directory), model_max_length=_NO_LIMIT)
    # transformers raises OSError, ValueError, TypeError, KeyError and more.
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{directory}: not a tokenizer ({first_line(error)})") from None
    if not isinstance(tokenizer.eos_token, str):
        raise UserError(f'{settings}: set "eos_token" to the end-of-text token')
    tokenizer.decode(tokenizer("A 1").input_ids)
    return tokenizer


def check_vocabulary(
    largest: int,
    size: int,
    instead: str = "write the model's tokenizer",
    tokenizer: os.PathLike | str | None = None,
) -> None:
    """Raises a `UserError` if the largest token is beyond a vocabulary, where no embedding is.

    Args:
      largest: the largest token.
      size: of the model's vocabulary.
      instead: what the user does to give the model's tokenizer.
      tokenizer: what the message calls the tokenizer.
    """
    if largest >= size:
        of = f" of {tokenizer}" if tokenizer else ""
        raise UserError(
            f"the tokenizer{of} gives token {largest}, but the model's vocabulary has {size}; "
            f"{instead}"
        )


@contextlib.contextmanager
def _library_errors(file: os.PathLike) -> Iterator[None]:
    """Raises what the library `tokenizers` raises as a `UserError` that names the file.

    The library is written in Rust. Its errors are `Exception` itself. A Rust panic is a
    BaseException of a type that cannot be imported, and prints a page to file descriptor 2.
    """
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as printed:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            printed.truncate(0)
            raise UserError(f"{file}: the tokenizer does not work ({first_line(error)})") from None
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            printed.seek(0)
            if text := printed.read():
                os.write(2, text)
