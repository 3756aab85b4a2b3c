"""One way to report a user's mistake: one line that says what to write instead, exit code 2."""

import argparse
import contextlib
import errno
import gc
import math
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
_NO_DEVICES = (
    "jax cannot start its devices; check JAX_PLATFORMS, and see what `python -m olmoe_jax.doctor` "
    "says"
)


class UserError(argparse.ArgumentTypeError):
    """Bad usage or bad input. The message is one line and says what to do about it.

    The type of a flag may raise it: argparse then names the flag.
    """


class ArgumentParser(argparse.ArgumentParser):
    """The parser of all commands: bad usage is one line like every other mistake.

    Flags are written in full, and description and epilog are printed as they are. The types int and
    float mean a number that fits 64 bits, and a finite one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if sys.argv[0].startswith("olmoe-jax ") and kwargs.get("prog", "").startswith("python "):
            kwargs["prog"] = sys.argv[0]  # of olmoe_jax.commands
        super().__init__(*args, **kwargs)
        self.register("type", int, whole_number(-_INT64))
        self.register("type", float, _finite_number)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


_INT64 = 2**63 - 1


def whole_number(lowest: int, highest: int = _INT64) -> Callable[[str], int]:
    """Returns the type of a flag whose value is a whole number from `lowest` to `highest`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):  # not a number, or of more than 4,300 digits
            if lowest <= int(text) <= highest:
                return int(text)
        limits = f", {lowest} or more" if highest == _INT64 else f", {lowest} to {highest}"
        limits = limits if lowest > -_INT64 else ""
        raise UserError(f"{shorten(text)}: expected a whole number{limits}")

    return parse


SEED = whole_number(0, 2**32 - 1)
"""The type of a flag whose value seeds random numbers; jax and numpy take 32 bits."""


def _finite_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise UserError(f"{shorten(text)}: expected a number")


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


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, to quote in a one-line message."""
    lines = text_of(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shorten(text: str, length: int = 80) -> str:
    """Returns text of at most `length` characters; what is cut becomes "…"."""
    return text if len(text) <= length else text[: length - 1] + "…"


def text_of(value: Any, to_text: Callable[[Any], str] = str) -> str:
    """Returns `to_text(value)`, or the name of the value's type where that fails."""
    try:
        return to_text(value)
    except Exception:  # an int of more than 4,300 digits, or a user's class
        return f"<{type(value).__name__}>"


_BAR = re.compile(r"\r?(\x1b\[A)*")
"""How a progress bar begins what it writes: at the beginning of the line, some lines further up."""


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

    Standard output and error become streams that write `printable` text alone. The exit code is 0
    on success, and that of `outcome` on an error.
    """
    # Tracing a program makes many objects and no garbage: looking for it takes a tenth of a start.
    gc.set_threshold(100_000, 20, 20)
    for name in ("stdout", "stderr"):
        stream = unescaped(getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
        # A lone surrogate in a file's name, or in an answer, can be written.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        setattr(sys, name, _Printable(stream, bars=name == "stderr"))
    try:
        for argument in sys.argv[1:]:
            if _HALF.search(argument):
                raise UserError(f"{argument}: is not UTF-8 text; write another")
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, `head` for example, has gone. Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        code, line = outcome(error)
        print(line, file=sys.stderr)
        sys.exit(code)


_HALF = re.compile("[\ud800-\udfff]")
"""Half a character: Python's reading of a byte that is not UTF-8."""


def outcome(error: BaseException) -> tuple[int, str]:
    """Returns the exit code of a command that ends by an error, and the line to print.

    The code is 2 for a `UserError`, a refusal of the operating system, too little memory and
    devices that do not start, and 130 for an interrupt. Another exception is a defect of this
    project: 70, and the line names a file that has the traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, UserError):
        return 2, f"error: {_message(str(error))}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _HINTS):
        name = "" if error.filename is None else f"{error.filename}: "
        return 2, f"error: {_message(name + os_reason(error))}"
    what = one_line(f"{type(error).__name__}: {text_of(error)}")
    if _is_of_devices(error):
        return 2, f"error: {_NO_DEVICES} ({shorten(what, 300)})"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return 2, f"error: {_MEMORY} ({shorten(what, 200)})"
    return DEFECT, _defect(error, shorten(what, 300))


def _is_of_devices(error: BaseException) -> bool:
    """Returns whether jax could not start its devices.

    jax names a platform that does not start, and asserts that one in JAX_PLATFORMS is here.
    """
    if isinstance(error, AssertionError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        return bool(frames) and frames[-1].f_globals.get("__name__") == "jax._src.xla_bridge"
    return isinstance(error, RuntimeError) and "Unable to initialize backend" in text_of(error)


def _message(text: str) -> str:
    """Returns one line of at most 1,200 characters, without the middle of a longer text.

    The line begins with the thing that is wrong and ends with the advice.
    """
    line = one_line(text)
    return line if len(line) <= 1200 else f"{line[:800]} … {line[-397:]}"


def _defect(error: BaseException, what: str) -> str:
    """Keeps the traceback in a file, and returns the line that says so."""
    text = "".join(traceback.format_exception(error))
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
