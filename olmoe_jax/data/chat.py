"""Conversations -> text, with the parts that train: turns joined plainly, or a chat template."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_jax.checkpoints.directory import TEMPLATE_FILES, write_json
from olmoe_jax.errors import UserError, first_line
from olmoe_jax.files import read_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

BOOKKEEPING = "dataset,id,idx,index,length,raw_answers,source"
"""Fields that say where a row is from. No format uses them."""

_EXCLUDES = {"weight": 0, "train": False, "training": False}
"""Fields of an assistant turn, and the value that keeps the turn out of the loss."""
_LINKS = ("tool_call_id",)
"""Fields that a template need not print: they say which call a result belongs to."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of one thing, which transformers gives to the template under each."""
_NEEDS_TEMPLATE = (
    "is used only by a chat template; name one (chat_template), or leave the field out "
    "(data.ignore_fields)"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class FormattedRow:
    """The text of a row and the parts of it that train.

    Attributes:
      text: the text.
      spans: (start, end) in characters of `text` of each part that trains, in their order.
      templated: whether a chat template made the text.
    """

    text: str
    spans: tuple[Span, ...]
    templated: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of a tokenizer, which transformers renders.

    Attributes:
      name: what messages call the template.
      sources: the Jinja text under the name "default". A tokenizer may have another for
        conversations with tools, "tool_use".
      tokenizer: the tokenizer, whose special tokens the template may print.
    """

    name: str
    sources: Mapping[str, str]
    tokenizer: "PreTrainedTokenizerBase"

    def source(self, tools: list | None = None) -> str:
        """Returns the Jinja text for a conversation."""
        return self.sources.get("tool_use" if tools else "default", self.sources["default"])

    def has_marks(self, tools: list | None) -> bool:
        """Returns whether the template marks what an assistant writes: {% generation %}."""
        return _MARKS.search(self.source(tools)) is not None

    @cached_property
    def digest(self) -> str:
        """Hash of what determines the text of a conversation."""
        parts = json.dumps([dict(self.sources), self._special_tokens], sort_keys=True)
        return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return self.tokenizer.special_tokens_map

    def render(
        self, messages: Sequence[Message], tools: list | None = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Returns the text of messages, and the spans that the template marks.

        Args:
          messages: the conversation.
          tools: the JSON schemas of the tools.
          prompt: put what an assistant's turn begins with behind the text.

        Raises:
          UserError: the template is wrong, or refuses the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=self.has_marks(tools),
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        # A template is a program of somebody else's, and may raise anything.
        except Exception as error:
            raise UserError(
                f"{self.name} does not take the messages: {first_line(error)}"
            ) from None
        return text, marks[0] if marks else []

    @cached_property
    def ends(self) -> list[int]:
        """The token ids that end a turn: the tokenizer's eos, and the template's end of turn."""
        end = self.tokenizer.eos_token_id
        mark = "0123456789"
        try:
            text, _ = self.render([_turn("user", "A"), _turn("assistant", mark)])
        except UserError:  # a conversation will say what is wrong
            return [end]
        if mark not in text:
            return [end]
        rest = self.tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
        added = self.tokenizer.added_tokens_decoder
        return sorted({end, *[i for i in rest if i in added and added[i].special][:1]})


def chat_template(spec: str | None, tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate | None:
    """Returns the template that `data.chat_template` names.

    Args:
      spec: "auto" (the tokenizer's own, if it has one), a file, or None.
      tokenizer: the tokenizer.

    Raises:
      UserError: the file cannot be read, or the tokenizer has several templates without a default.
    """
    if spec is None:
        return None
    if spec != "auto":
        sources = {"default": read_text(Path(spec))}
        return ChatTemplate(f"chat template {spec}", sources, tokenizer)
    own = tokenizer.chat_template
    if not own:
        return None
    sources = own if isinstance(own, dict) else {"default": own}
    if "default" not in sources or not all(isinstance(s, str) for s in sources.values()):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has chat templates, but no text named "
            "default; write one to a file and set data.chat_template to it"
        )
    return ChatTemplate("the tokenizer's chat template", sources, tokenizer)


def write_template(files: Path, template: ChatTemplate | None) -> None:
    """Makes a directory of tokenizer files carry this template alone, or none."""
    for name in TEMPLATE_FILES:
        (files / name).unlink(missing_ok=True)
    settings = files / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(dict[str, Any], settings)
        if content.pop("chat_template", None) is not None:
            write_json(settings, content)
    if template:
        (files / TEMPLATE_FILES[0]).write_text(template.source(), encoding="utf-8")


def checked_messages(value: Any, field: str, ignored: Iterable[str] = ()) -> list[Message]:
    """Returns messages without null fields and `ignored` ones.

    Raises:
      UserError: they are no list of objects with a role.
    """
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise UserError(f"field {field} must be a list of objects with role and content")
    messages = [
        {name: v for name, v in message.items() if v is not None and name not in ignored}
        for message in value
    ]
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise UserError(f"field {field}[{index}].role must be text")
    return messages


def templated(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate, train_on: str
) -> FormattedRow:
    """Returns the text of a conversation by its template, and the parts that train.

    Raises:
      UserError: the template refuses the messages, prints nothing of what they say, or does not
        show which part an assistant wrote.
    """
    messages, wanted = _trained_turns(messages, train_on)
    text, marks = template.render(messages, tools)
    checked_text(text, "messages")
    _check_printed(messages, tools, template, text)
    needed = [turn for turn in wanted if wanted[turn] != (train_on == "all")]
    if not template.has_marks(tools):
        spans = {turn: _span(messages, tools, template, text, turn) for turn in needed}
    elif len(marks) == len(wanted) or not needed:
        spans = dict(zip(wanted, marks, strict=False))
    elif train_on == "answers" and all(wanted.values()):
        return FormattedRow(text, tuple(marks), templated=True)
    else:
        raise UserError(
            f"{template.name} marks {len(marks)} parts of {len(wanted)} assistant turns, so that "
            "it does not say which part is which turn; mark one part a turn"
        )
    return FormattedRow(text, trained(len(text), spans, wanted, train_on), templated=True)


def joined(
    messages: Sequence[Message], tools: list | None, eos: str, train_on: str
) -> FormattedRow:
    """Returns a conversation without a template, in which every assistant turn ends in `eos`.

    One user and one assistant turn give exactly the text of a prompt and its completion. Further
    turns are joined by the same rule. A system turn goes in front of the first user turn, with a
    newline between the two.

    Raises:
      UserError: the turns do not alternate, or say what cannot be said without a template.
    """
    messages, wanted = _trained_turns(messages, train_on)
    for index, message in enumerate(messages):
        for name, value in message.items():
            if name not in ("role", "content") and has_content(value):
                raise UserError(f"field messages[{index}].{name} {_NEEDS_TEMPLATE}")
    if tools:
        raise UserError(f"field tools {_NEEDS_TEMPLATE}")
    roles = [message["role"] for message in messages]
    contents = [checked_text(message.get("content"), "content") for message in messages]
    first = int(roles[:1] == ["system"])
    if len(roles) == first or roles[first:] != ["user", "assistant"] * ((len(roles) - first) // 2):
        raise UserError(
            "field messages must hold an optional system turn, then user and assistant turns "
            "that alternate and end with the assistant's (a chat: with the user's); or name a "
            "chat template (chat_template)"
        )
    if first:
        contents[:2] = ["", f"{contents[0]}\n{contents[1]}"]
    pieces: list[str] = []
    spans: dict[int, Span] = {}
    length, last = 0, ""
    for index, content in enumerate(contents):
        piece = after(last, content) if index > first else content
        if index in wanted:
            piece += eos
            spans[index] = (length, length + len(piece))
        pieces.append(piece)
        length += len(piece)
        last = piece[-1:] or last
    return FormattedRow("".join(pieces), trained(length, spans, wanted, train_on))


def asked(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate | None, eos: str
) -> str:
    """Returns the text that a model continues with the assistant's next turn.

    Raises:
      UserError: the last turn is an assistant's; or as for `templated` and `joined`.
    """
    messages, _ = _trained_turns(messages, "answers")
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise UserError(
            "field messages must end with the turn that is to be answered, a user's or a tool's; "
            "leave an assistant's last turn out"
        )
    if template is None:
        row = joined([*messages, _turn("assistant", "")], tools, eos, "last_answer")
        return row.text[: row.spans[0][0]]
    text, _ = template.render(messages, tools)
    _check_printed(messages, tools, template, text)
    return checked_text(template.render(messages, tools, prompt=True)[0], "messages")


def answered(
    messages: Sequence[Message],
    tools: list | None,
    template: ChatTemplate | None,
    prompt: str,
    text: str,
) -> Message:
    """Returns the assistant's turn that a model wrote as `text` behind the `prompt` of `asked`.

    The turn's content is such that further turns have prompt and text as they were before them, if
    the template can say so: some put a space in front of a content.
    """
    for content in (text.removeprefix(" "), text):
        turn = _turn("assistant", content)
        history = [*messages, turn]
        plain = template is None
        said = (
            joined(history, tools, "", "all").text if plain else template.render(history, tools)[0]
        )
        if said.startswith(prompt + text):
            return turn
    return turn


def after(before: str, text: str) -> str:
    """Returns `text` as it follows `before`: with a space between unless there is whitespace."""
    # The reference looks at these three characters alone: other whitespace gets a space too.
    whitespace = (" ", "\n", "\t")
    separated = before.endswith(whitespace) or text.startswith(whitespace)
    return text if separated else f" {text}"


def checked_text(value: Any, field: str) -> str:
    """Returns `value` if it is text that has a UTF-8 form, or raises a `UserError`."""
    if not isinstance(value, str):
        raise UserError(f"field {field} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise UserError(f"field {field} is not valid Unicode: {error.reason}") from error
    return value


def has_content(value: Any) -> bool:
    """Returns whether a field says something: it is not null, nor empty."""
    return value is not None and (not isinstance(value, str | list | Mapping) or len(value) > 0)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _trained_turns(
    messages: Sequence[Message], train_on: str
) -> tuple[list[Message], dict[int, bool]]:
    """Returns the messages without weights, and of each assistant's index whether it trains."""
    wanted: dict[int, bool] = {}
    plain = []
    for index, message in enumerate(messages):
        rest = {name: value for name, value in message.items() if name not in _EXCLUDES}
        plain.append(rest)
        says = {name: message[name] for name in _EXCLUDES if name in message}
        for name, value in says.items():
            known = (0, 1) if name == "weight" else (False, True)
            if value not in known or isinstance(value, bool) != (name != "weight"):
                accepted = "0 or 1" if name == "weight" else "true or false"
                raise UserError(f"field messages[{index}].{name} must be {accepted}")
        trains = all(value != _EXCLUDES[name] for name, value in says.items())
        if message["role"] == "assistant":
            wanted[index] = trains
        elif says and trains:
            raise UserError(
                f"field messages[{index}].{next(iter(says))} asks to train on a turn that is no "
                "assistant's; leave it out, or set data.train_on=all"
            )
    if train_on == "last_answer" and wanted:
        wanted |= dict.fromkeys([*wanted][:-1], False)
    return plain, wanted


def trained(
    length: int, spans: Mapping[int, Span], wanted: Mapping[int, bool], train_on: str
) -> tuple[Span, ...]:
    """Returns the spans that train: the wanted ones, or all but the unwanted ones."""
    if train_on != "all":
        return tuple(span for turn, span in sorted(spans.items()) if wanted[turn])
    unwanted = [span for turn, span in sorted(spans.items()) if not wanted[turn]]
    starts = [0, *(end for _, end in unwanted)]
    ends = [*(start for start, _ in unwanted), length]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _span(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate, text: str, turn: int
) -> Span:
    """Returns the part of `text` that the assistant wrote in a turn, by rendering prefixes."""
    before, _ = template.render(messages[:turn], tools, prompt=True)
    until = text if turn == len(messages) - 1 else template.render(messages[: turn + 1], tools)[0]
    if not text.startswith(before) or not text.startswith(until):
        raise UserError(
            f"{template.name} writes the conversation up to messages[{turn}] in another way once "
            "more turns follow, so that the answer is not what the model will be asked for; set "
            "data.train_on=last_answer, or write a template with {% generation %} marks"
        )
    return len(before), len(until)


def _check_printed(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate, text: str
) -> None:
    """Raises a `UserError` if the template prints nothing of something that the messages say."""

    def refuse_unprinted(what: str, without: list[Message], tools: list | None = tools) -> None:
        try:
            printed = template.render(without, tools)[0] != text
        except UserError:
            printed = True  # the template cannot do without it
        if not printed:
            raise UserError(
                f"{template.name} prints nothing of {what}; write one that does, or leave it out "
                "(data.ignore_fields)"
            )

    if tools:
        refuse_unprinted("field tools", list(messages), None)
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in _parts(content, index):
            if part.strip() not in text:
                blank = {**message, "content": ""}
                what = f"field messages[{index}].content (role {message['role']})"
                refuse_unprinted(what, [*messages[:index], blank, *messages[index + 1 :]])
        if isinstance(content, list) and str(content) in text:
            raise UserError(
                f"{template.name} takes no list of parts; write messages[{index}].content as text"
            )
    names = {name for message in messages for name in message if has_content(message[name])}
    for name in sorted(names - {"role", "content", *_LINKS}):
        values = [message[name] for message in messages if name in message]
        if all(isinstance(value, str) and value.strip() in text for value in values):
            continue
        if name == "name" and all(m["role"] == "tool" for m in messages if name in m):
            continue  # the call says it
        same = _REASONING if name in _REASONING else (name,)
        without = [{n: v for n, v in m.items() if n not in same} for m in messages]
        refuse_unprinted(f"field {name} of the messages", without)


def _parts(content: Any, index: int) -> list[str]:
    """Returns the texts of a content, which is text, a list of text parts, or absent."""
    if content is None:
        return []
    if not isinstance(content, list):
        return [checked_text(content, f"messages[{index}].content")]
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(
                f"field messages[{index}].content must be text, or a list of parts that are "
                'text: {"type": "text", "text": "…"}'
            )
    return [checked_text(part["text"], f"messages[{index}].content") for part in content]
