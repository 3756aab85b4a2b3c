"""One way to report a user's mistake: one line that says what to write instead, exit code 2."""

import argparse
import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

DEFECT = 70
"""The exit code of an exception that nobody foresaw: sysexits.h's EX_SOFTWARE."""

_HINTS = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "write a path on another file system",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "write a file's path",
    errno.EEXIST: "write another path, or remove what is there",
    errno.ENOTEMPTY: "write another path, or remove what is there",
    errno.ENAMETOOLONG: "write a shorter path",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOSPC: "make room, or write a path on another disk",
    errno.EDQUOT: "make room, or write a path on another disk",
    errno.EFBIG: "write a path on another file system",
    errno.EIO: "the disk reports a fault",
}


_MEMORY = "not enough memory; `python -m olmoe_jax.plan` says what a run needs and what needs less"


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


def os_reason(error: OSError) -> str:
    """Returns what the operating system refused and what helps: "File name too long; …"."""
    reason = error.strerror or one_line(str(error)) or type(error).__name__
    reason = reason[0].lower() + reason[1:]
    hint = _HINTS.get(error.errno or 0)
    return f"{reason}; {hint}" if hint else reason


_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, without tab and newline
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # bidirectional marks
    r"\u2028\u2029\ud800-\udfff\ufffe\uffff]"  # line separators, surrogates, no characters
)


def printable(text: str) -> str:
    """Returns text without characters that steer a terminal or reorder what a reader sees.

    A control character, a bidirectional mark, a lone surrogate and a line separator become their
    escapes (\\x1b). Newlines and tabs stay.
    """
    return _STEERING.sub(_escape, text)


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Returns text as one line that is safe to print."""
    return printable(" ".join(text.split()))


def shorten(text: str, length: int = 80) -> str:
    """Returns text of at most `length` characters; what is cut becomes "…"."""
    return text if len(text) <= length else text[: length - 1] + "…"


_BAR = re.compile(r"\r?(\x1b\[A)*")
"""How a progress bar begins what it writes: at the line's begin, some lines further up."""


class _Printable:
    """A text stream that writes `printable` text.

    Args:
      unescaped: the stream below.
      bars: progress bars write to the stream too.
    """

    def __init__(self, unescaped: TextIO, bars: bool):
        self.unescaped, self._bars = unescaped, bars

    def write(self, text: str) -> int:
        start = _BAR.match(text).end() if self._bars else 0
        self.unescaped.write(text[:start] + printable(text[start:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: TextIO) -> TextIO:
    """Returns the stream that writes text as it is, below the one that `run_command` installs."""
    return getattr(stream, "unescaped", stream)


def data_output() -> TextIO:
    """Returns the standard output for data: exact, unless the output is a terminal."""
    return sys.stdout if sys.stdout.isatty() else unescaped(sys.stdout)


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command line program and exits.

    Standard output and error become streams that write `printable` text alone.

    The exit code is 0 on success, 2 with one line on a `UserError` or a refusal of the operating
    system, 130 on an interrupt. Another exception is a defect of this project: 70, one line, and
    the traceback in a file that the line names.
    """
    for name in ("stdout", "stderr"):
        stream = unescaped(getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
        # A lone surrogate in a file's name, or in an answer, can be written.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        setattr(sys, name, _Printable(stream, bars=name == "stderr"))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _exit(2, f"error: {one_line(str(error))}")
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except BrokenPipeError:
        # The reader of the output, `head` for example, has gone. Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _HINTS:
            _exit(DEFECT, _defect(error))
        name = "" if error.filename is None else f"{error.filename}: "
        _exit(2, f"error: {one_line(name + os_reason(error))}")
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _exit(2, f"error: {_MEMORY} ({shorten(one_line(str(error)), 200)})")
        _exit(DEFECT, _defect(error))


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _defect(error: Exception) -> str:
    """Keeps the traceback in a file, and returns the line that says so."""
    text = "".join(traceback.format_exception(error))
    what = shorten(one_line(f"{type(error).__name__}: {error}"), 300)
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="olmoe_jax-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            file.write(f"{sys.argv}\n{text}")
    except OSError:
        return f"{text}error: this is a defect in olmoe_jax ({what})"
    return (
        f"error: this is a defect in olmoe_jax ({what}); please report it with {file.name}, which "
        "has the traceback"
    )
