"""One way to report a user's mistake: one line that says what to write instead, exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """Bad usage or bad input. The message is one line and says what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """The parser of all commands: bad usage is one line like every other mistake.

    Flags are written in full, and description and epilog are printed as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command line program: exit 0 on success, 2 with one line on a `UserError`."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
