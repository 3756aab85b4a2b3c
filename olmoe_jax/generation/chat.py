"""The chat of `python -m olmoe_jax.generate --chat`: conversations -> an assistant's answers.

`olmoe_jax/data/chat.py` renders the conversations, as it does for training.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_jax.data.chat import answered, asked
from olmoe_jax.data.chat_template import Message, chat_template
from olmoe_jax.data.formats import RowRules, Tools, conversation
from olmoe_jax.data.reading import read_rows
from olmoe_jax.errors import UserError, data_output, one_line
from olmoe_jax.files import decode, utf8
from olmoe_jax.generation.stop_strings import settled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[..., list[str]]
"""`olmoe_jax.generate` with a model and its options: takes prompts and `watch`, returns texts."""


@dataclass(frozen=True)
class Format:
    """How conversations become text.

    Attributes:
      rules: the chat template, and the fields that count as absent.
      tokenizer: the model's.
    """

    rules: RowRules
    tokenizer: "PreTrainedTokenizerBase"

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Returns the text that the model continues."""
        return asked(messages, tools, self.rules.template, self.tokenizer.eos_token)

    def answer(self, messages: Sequence[Message], tools: Tools, prompt: str, text: str) -> Message:
        """Returns the assistant's turn that the model wrote as `text`."""
        return answered(messages, tools, self.rules.template, prompt, text)


def open_format(spec: str, tokenizer: "PreTrainedTokenizerBase", place: str | Path) -> Format:
    """Returns the format that --chat_template names.

    Args:
      spec: "auto", "none" for turns that are joined plainly, or a file.
      tokenizer: the model's, which has the template of "auto".
      place: where the tokenizer is, for messages.

    Raises:
      UserError: a template is missing or wrong.
    """
    template = chat_template(None if spec == "none" else spec, tokenizer)
    if template is None and spec != "none":
        raise UserError(
            f"{place} has no chat template; write --chat_template FILE (Jinja), or "
            "--chat_template none for a model whose training joined turns without one"
        )
    return Format(RowRules(template), tokenizer)


@dataclass(frozen=True)
class Conversation:
    """A conversation that waits for an assistant's turn.

    Attributes:
      row: the row of the file.
      messages: its turns, a system turn in front.
      tools: the tools' JSON schemas.
      prompt: the text that the model continues.
    """

    row: Mapping[str, Any]
    messages: list[Message]
    tools: Tools
    prompt: str


def read_conversations(
    prompts: Sequence[str], file: str | None, system: str | None, chat: Format
) -> list[Conversation]:
    """Returns the conversations of the command line: messages, then the rows of a file.

    Raises:
      UserError: a row is wrong, or has a system turn beside `system`; the message names the place.
    """
    rows = [("--prompt", {"messages": [{"role": "user", "content": text}]}) for text in prompts]
    return [_waiting(place, row, system, chat) for place, row in [*rows, *_rows(file)]]


def _rows(file: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if file == "-":
        lines = [(n, line) for n, line in enumerate(sys.stdin.buffer, 1) if line.strip()]
        if not lines:
            raise UserError("standard input is empty; write a row of messages on each line")
        for number, line in lines:
            place = f"standard input: line {number}"
            yield place, decode(dict[str, Any], utf8(line, place), place)
    elif file is not None:
        yield from read_rows(file)


def _waiting(place: str, row: dict[str, Any], system: str | None, chat: Format) -> Conversation:
    try:
        messages, tools = conversation(row, chat.rules)
        if system is not None:
            if any(message["role"] == "system" for message in messages):
                raise UserError("has a system turn of its own; leave --system out")
            messages = [{"role": "system", "content": system}, *messages]
        return Conversation(row, messages, tools, chat.prompt(messages, tools))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def answer(conversations: Sequence[Conversation], chat: Format, generate: Decode) -> list[Message]:
    """Returns an assistant's turn for each conversation."""
    texts = generate([c.prompt for c in conversations], progress=len(conversations) > 1)
    return [
        chat.answer(c.messages, c.tools, c.prompt, text)
        for c, text in zip(conversations, texts, strict=True)
    ]


def as_json(asked: Conversation, turn: Message) -> str:
    """Returns a line of JSON: the row with the assistant's turn behind its messages."""
    row = {**asked.row, "messages": [*asked.row["messages"], turn]}
    return json.dumps(row, ensure_ascii=False, default=str)


class Session:
    """A conversation that grows by a message and its answer at a time.

    Args:
      chat: how the conversation becomes text.
      generate: continues a prompt.
      system: the text of a system turn, or None.
      room: tokens that a prompt may have. The oldest messages and answers beyond are left out.
    """

    def __init__(self, chat: Format, generate: Decode, system: str | None, room: int):
        self._chat, self._generate, self._room = chat, generate, room
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation up to now."""
        return [*self._system, *self._turns]

    def say(self, message: str, watch: Callable[[str], object] | None = None) -> str:
        """Returns the answer to a message.

        Args:
          message: the user's.
          watch: called with the answer as far as it is written. Where a KeyboardInterrupt comes
            during it or the decoding, the answer ends. A message without an answer is forgotten.
        """
        turns = [*self._turns, {"role": "user", "content": message}]
        prompt = self._chat.prompt([*self._system, *turns])
        while len(turns) > 1 and self._count(prompt) > self._room:
            turns = turns[2:]
            prompt = self._chat.prompt([*self._system, *turns])
        if left_out := len(self._turns) + 1 - len(turns):
            print(
                f"the conversation does not fit the model's positions: its first {left_out} turns "
                "are left out",
                file=sys.stderr,
            )
        text = ""

        def keep(so_far: str) -> None:
            nonlocal text
            text = settled(so_far, ())
            if watch:
                watch(so_far)

        try:
            (text,) = self._generate([prompt], watch=keep)
        except KeyboardInterrupt:
            if watch is None:
                raise
            if not text:
                return ""
        turn = self._chat.answer([*self._system, *turns], None, prompt, text)
        self._turns = [*turns, turn]
        return turn["content"]

    def _count(self, prompt: str) -> int:
        encoded = self._chat.tokenizer(prompt, add_special_tokens=False, verbose=False)
        return len(encoded.input_ids)


def converse(session: Session, stop: Sequence[str]) -> None:
    """Answers the lines of the standard input until it ends.

    On a terminal the answers appear as they are written. Ctrl-C stops an answer, and ends the
    session where none is being written. A message that cannot be answered is reported there; in a
    pipe it ends the command.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for message in _piped():
            print(session.say(message), file=data_output(), flush=True)
        return
    print("Ctrl-C stops an answer; here it ends the chat, and so does Ctrl-D", file=sys.stderr)
    for message in _typed():
        try:
            with _ctrl_c() as pressed:
                screen = _Screen(stop, pressed)
                screen.finish(session.say(message, screen.show))
        except UserError as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)


class _Screen:
    """Shows an answer on the terminal as it grows.

    Args:
      stop: the strings that end an answer.
      pressed: not empty once the user has pressed Ctrl-C.
    """

    def __init__(self, stop: Sequence[str], pressed: Sequence[int]):
        self._stop, self._pressed, self._shown = stop, pressed, 0

    def show(self, text: str) -> None:
        """Shows what is new in the answer up to now; raises KeyboardInterrupt after Ctrl-C."""
        self._print(settled(text, self._stop), end="")
        if self._pressed:
            raise KeyboardInterrupt

    def finish(self, answer: str) -> None:
        """Shows the rest of the answer."""
        self._print(answer, end="\n")

    def _print(self, text: str, end: str) -> None:
        text = text.lstrip()
        print(text[self._shown :], end=end, flush=True)
        self._shown = max(self._shown, len(text))


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Yields a list that the first Ctrl-C of the block fills; the next one interrupts.

    An answer then ends between two tokens, not in the middle of a library's work.
    """
    pressed: list[int] = []

    def press(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    former = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, former)


def _typed() -> Iterator[str]:
    """Yields what a user types at a prompt."""
    with contextlib.suppress(ImportError):
        import readline  # input() then edits the line

        # Or it would write a control sequence before each prompt.
        readline.parse_and_bind("set enable-bracketed-paste off")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("error: this is not UTF-8 text; write the message again", file=sys.stderr)
            continue
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    """Yields the lines of the standard input."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        text = utf8(line, f"standard input: line {number}").rstrip("\r\n")
        if text.strip():
            yield text
