"""Conversations -> text, with the parts that train: turns joined plainly, or a chat template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmoe_jax.data.chat_template import ChatTemplate, Message, Span
from olmoe_jax.data.fields import AvoidableError, checked_text, has_content
from olmoe_jax.data.printed import check_printed
from olmoe_jax.errors import UserError

BOOKKEEPING = "dataset,id,idx,index,length,raw_answers,source"
"""Fields that say where a row is from. No format uses them."""

_EXCLUDES = {"weight": 0, "train": False, "training": False}
"""Fields of an assistant turn, and the value that keeps the turn out of the loss."""
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_SHAREGPT_FIELDS = {"from": "role", "value": "content"}
"""ShareGPT's fields, and what `messages` call them. Some of its files have the latter."""


@dataclass(frozen=True)
class FormattedRow:
    """The text of a row and the parts of it that train."""

    text: str
    spans: tuple[Span, ...]  # (start, end) in characters of each part that trains, in their order
    templated: bool = False  # a chat template made the text


def checked_messages(value: Any, field: str, ignored: Iterable[str] = ()) -> list[Message]:
    """Returns messages without the fields that are null or `ignored`, in lists of parts too.

    Raises:
      UserError: they are no list of objects with a role.
    """
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise UserError(f"field {field} must be a list of objects with role and content")

    def kept(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: v for name, v in fields.items() if v is not None and name not in ignored}

    messages = [kept(message) for message in value]
    for message in messages:
        if isinstance(content := message.get("content"), list):
            parts = [kept(part) if isinstance(part, Mapping) else part for part in content]
            message["content"] = parts
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise UserError(f"field {field}[{index}].role must be text")
    return messages


def sharegpt_messages(turns: Any) -> list[Message]:
    """Returns the messages of the turns of ShareGPT.

    Raises:
      UserError: the turns are of another form, or a role is not known.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError("field conversations must be a list of objects with from and value")
    messages = []
    for index, turn in enumerate(turns):
        message = {name: v for name, v in turn.items() if name not in _SHAREGPT_FIELDS}
        for theirs, ours in _SHAREGPT_FIELDS.items():
            if turn.get(theirs) is None:
                continue
            if has_content(turn.get(ours)):
                raise UserError(
                    f"field conversations[{index}] has both {theirs} and {ours}; remove one"
                )
            message[ours] = turn[theirs]
        role = message.get("role")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise UserError(f"field conversations[{index}].from must be one of {known}")
        messages.append({**message, "role": _SHAREGPT_ROLES[role]})
    return messages


def templated(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate, train_on: str
) -> FormattedRow:
    """Returns the text of a conversation by its template, and the parts that train.

    Raises:
      UserError: the template refuses the messages, prints nothing of what they say, or does not
        show which part an assistant wrote.
    """
    messages, wanted = trained_turns(messages, train_on)
    text, marks = template.render(messages, tools)
    checked_text(text, "messages")
    check_printed(messages, tools, template, text)
    answers = [turn for turn in wanted if messages[turn]["role"] == "assistant"]
    marked = answers if template.has_marks(tools) else []
    if marked and not marks:
        raise UserError(
            f"{template.name} marks nothing of {len(marked)} assistant turns; put "
            "{% generation %} and {% endgeneration %} around what an assistant writes"
        )
    if marked and train_on == "answers" and all(wanted.values()):
        return FormattedRow(text, tuple(marks), templated=True)
    needed = [turn for turn in wanted if wanted[turn] != (train_on == "all")]
    if len(marks) != len(marked) and not set(needed).isdisjoint(marked):
        raise UserError(
            f"{template.name} marks {len(marks)} parts of {len(marked)} assistant turns, so that "
            "it does not say which part is which turn; mark one part a turn"
        )
    spans = dict(zip(marked, marks, strict=False))
    for turn in needed:
        if turn not in spans:
            spans[turn] = _span(messages, tools, template, text, turn)
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
    messages, wanted = trained_turns(messages, train_on)
    for index, message in enumerate(messages):
        for name, value in message.items():
            if name not in ("role", "content") and has_content(value):
                raise _needs_template(f"messages[{index}].{name}")
    if tools:
        raise _needs_template("tools")
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
        contents[0] += "\n"
    pieces: list[str] = []
    spans: dict[int, Span] = {}
    length, last = 0, ""
    for index, content in enumerate(contents):
        piece = after(last, content) if index > first else content
        if roles[index] == "assistant":
            piece += eos
        if index in wanted:
            spans[index] = (length, length + len(piece))
        pieces.append(piece)
        length += len(piece)
        last = piece[-1:] or last
    return FormattedRow("".join(pieces), trained(length, spans, wanted, train_on))


def _needs_template(field: str) -> AvoidableError:
    return AvoidableError(
        f"field {field} is used only by a chat template; name one (chat_template), or leave the "
        "field out",
        " (data.ignore_fields)",
    )


def after(before: str, text: str) -> str:
    """Returns `text` as it follows `before`: with a space between unless there is whitespace."""
    # The reference looks at these three characters alone: other whitespace gets a space too.
    whitespace = (" ", "\n", "\t")
    separated = before.endswith(whitespace) or text.startswith(whitespace)
    return text if separated else f" {text}"


def trained_turns(
    messages: Sequence[Message], train_on: str
) -> tuple[list[Message], dict[int, bool]]:
    """Returns the messages without weights, and {index of a turn: whether the turn trains}.

    The dict has all turns of an assistant and, with train_on="all", the others that do not train.
    """
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
        if message["role"] == "assistant" or (train_on == "all" and not trains):
            wanted[index] = trains
        elif says and trains and train_on != "all":
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
    """Returns the part of `text` that holds a turn, by rendering the turns up to it.

    An assistant's part holds what the assistant writes, and not what asks for the answer.
    """
    asks = messages[turn]["role"] == "assistant"
    before, _ = template.render(messages[:turn], tools, prompt=asks)
    last = turn == len(messages) - 1
    until = text if last else template.render(messages[: turn + 1], tools)[0]
    if not text.startswith(until):  # Phi 3 ends the conversation with it, not the turn
        until = until.removesuffix(template.tokenizer.eos_token)
    if asks and not until.startswith(before):
        raise UserError(
            f"{template.name} asks for messages[{turn}] by a text that ends in {before[-20:]!r} "
            "(add_generation_prompt), and writes another in front of the answer, so that the "
            "model would train on another prompt than it will be given; write a template that "
            "keeps the text, or one with {% generation %} marks"
        )
    if not text.startswith(before) or not text.startswith(until):
        raise UserError(
            f"{template.name} writes the conversation up to messages[{turn}] in another way once "
            "more turns follow, so that the model would train on another prompt than it will be "
            "given; set data.train_on=last_answer, or write a template with {% generation %} marks"
        )
    return len(before), len(until)
