"""The chat of `python -m olmoe_jax.generate --chat`: conversations -> an assistant's answers.

`olmoe_jax/data/chat.py` renders the conversations, as it does for training.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_jax.checkpoints.turn_ends import read_turn_ends
from olmoe_jax.data import load_tokenizer
from olmoe_jax.data.chat import joined, trained_turns
from olmoe_jax.data.chat_template import Message, as_message, chat_template
from olmoe_jax.data.fields import checked_text
from olmoe_jax.data.formats import RowRules, Tools, conversation
from olmoe_jax.data.printed import check_printed
from olmoe_jax.data.reading import read_rows, row_of_line
from olmoe_jax.errors import UserError, data_output, one_line
from olmoe_jax.files import utf8
from olmoe_jax.generation.stop_strings import settled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[..., list[str]]
"""`olmoe_jax.generate` with a model and its options: takes prompts and `watch`, returns texts."""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become text, and where an answer ends."""

    rules: RowRules  # the chat template, and the fields that count as absent
    tokenizer: "PreTrainedTokenizerBase"
    ends: Collection[int]  # the token ids that end a text

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Returns the text that a model continues with the assistant's next turn.

        Raises:
          UserError: the last turn is an assistant's, or a text of these messages could not be
            trained on.
        """
        messages, _ = trained_turns(messages, "all")
        if not messages or messages[-1]["role"] in ("assistant", "system"):
            raise UserError(
                "field messages must end with the turn that is to be answered, a user's or a "
                "tool's; leave an assistant's last turn out"
            )
        template, eos = self.rules.template, self.tokenizer.eos_token
        if template is None:
            row = joined([*messages, as_message("assistant", "")], tools, eos, "last_answer")
            return row.text[: row.spans[0][0]]
        text, _ = template.render(messages, tools)
        check_printed(messages, tools, template, text)
        return checked_text(template.render(messages, tools, prompt=True)[0], "messages")

    def answer(self, messages: Sequence[Message], tools: Tools, prompt: str, text: str) -> Message:
        """Returns the assistant's turn that a model wrote as `text` behind the `prompt`.

        The turn's content is such that further turns have prompt and text as they were before
        them, if the template can say so: some put a space in front of a content.
        """
        template = self.rules.template
        for content in (text.removeprefix(" "), text):
            turn = as_message("assistant", content)
            history = [*messages, turn]
            if template is None:
                said = joined(history, tools, "", "all").text
            else:
                said, _ = template.render(history, tools)
            if said.startswith(prompt + text):
                return turn
        return turn


def open_format(
    spec: str, files: Path, adapter: str | None = None, tokenizer: str | None = None
) -> ChatFormat:
    """Returns the format of a model's conversations; opens the tokenizer.

    Args:
      spec: "auto", "none" for turns that are joined plainly, or a file: as --chat_template says.
      files: the model's directory.
      adapter: the model's adapter, or the LoRA run that made it. Its tokenizer and chat template
        replace the model's, if it has them.
      tokenizer: a directory or hub id whose tokenizer replaces both.

    Raises:
      UserError: tokenizer or template are missing or wrong.
    """
    from olmoe_jax.checkpoints.peft import adapter_directory  # imports jax

    tuned = files if adapter is None else adapter_directory(adapter)
    if not (tuned / "tokenizer.json").exists():
        tuned = files
    place = tokenizer or str(tuned)
    opened = load_tokenizer(place)
    template = chat_template(None if spec == "none" else spec, opened)
    if template is None and spec != "none":
        raise UserError(
            f"{place} has no chat template; write --chat_template FILE (Jinja), or "
            "--chat_template none for a model whose training joined turns without one"
        )
    rules = RowRules(template)
    ends = {*read_turn_ends(files), *read_turn_ends(tuned), *rules.ends(opened.eos_token_id)}
    return ChatFormat(rules, opened, sorted(ends))


@dataclass(frozen=True)
class Conversation:
    """A conversation that waits for an assistant's turn."""

    row: Mapping[str, Any]  # the row of the file
    messages: list[Message]  # its turns, a system turn in front
    tools: Tools
    prompt: str  # the text that the model continues


def read_conversations(
    prompts: Sequence[str], file: str | None, system: str | None, chat: ChatFormat
) -> list[Conversation]:
    """Returns the conversations of the command line: messages, then the rows of a file.

    Raises:
      UserError: a row is wrong, or has a system turn beside `system`; the message names the place.
    """
    rows = [("--prompt", {"messages": [{"role": "user", "content": text}]}) for text in prompts]
    return [_waiting(place, row, system, chat) for place, row in [*rows, *_rows(file)]]


def _rows(file: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if file == "-":
        lines = [*_stdin_lines()]
        if not lines:
            raise UserError("standard input is empty; write a row of messages on each line")
        for number, line in lines:
            place = f"standard input: line {number}"
            yield place, row_of_line(line.encode(), place)
    elif file is not None:
        yield from read_rows(file)


def _waiting(place: str, row: dict[str, Any], system: str | None, chat: ChatFormat) -> Conversation:
    try:
        messages, tools = conversation(row, chat.rules)
        if system is not None:
            if any(message["role"] == "system" for message in messages):
                raise UserError("has a system turn of its own; leave --system out")
            messages = [{"role": "system", "content": system}, *messages]
        return Conversation(row, messages, tools, chat.prompt(messages, tools))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def answer(
    conversations: Sequence[Conversation], chat: ChatFormat, generate: Decode
) -> list[Message]:
    """Returns an assistant's turn for each conversation."""
    texts = generate([c.prompt for c in conversations], progress=len(conversations) > 1)
    return [
        chat.answer(c.messages, c.tools, c.prompt, text)
        for c, text in zip(conversations, texts, strict=True)
    ]


def as_json(conversation: Conversation, turn: Message) -> str:
    """Returns a line of JSON: the row with the assistant's turn behind its messages."""
    row = {**conversation.row, "messages": [*conversation.row["messages"], turn]}
    return json.dumps(row, ensure_ascii=False, default=str)


class Session:
    """A conversation that grows by a message and its answer at a time.

    Args:
      chat: how the conversation becomes text.
      generate: continues a prompt.
      system: the text of a system turn, or None.
      room: the most tokens of a prompt. A longer one loses its oldest messages and answers.
    """

    def __init__(self, chat: ChatFormat, generate: Decode, system: str | None, room: int):
        self._chat, self._generate, self._room = chat, generate, room
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    def say(self, message: str, watch: Callable[[str], object] | None = None) -> str:
        """Returns the answer to a message.

        Args:
          message: the user's.
          watch: called with the answer as far as it is written. A KeyboardInterrupt, from `watch`
            or from the decoding, ends the answer. A message without an answer is forgotten.
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

    On a terminal the answers appear as they are written, and a message that cannot be answered is
    reported. Ctrl-C stops an answer, and ends the session where none is being written. In a pipe a
    message that cannot be answered ends the command.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for _, message in _stdin_lines():
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


def _stdin_lines() -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of each line of the standard input that is not blank."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        text = utf8(line, "standard input", number).rstrip("\r\n")
        if text.strip():
            yield number, text
