"""Checks that a chat template prints all that a conversation says."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from olmoe_jax.data.chat_template import ChatTemplate, Message
from olmoe_jax.data.fields import AvoidableError, checked_text, has_content
from olmoe_jax.errors import UserError

_LINKS = ("tool_call_id",)
"""Fields that a template need not print: they say which call a result belongs to."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of one thing, which transformers gives to the template under each."""


def check_printed(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate, text: str
) -> None:
    """Raises a `UserError` if the template leaves out something that messages or tools say.

    `text` is what the template printed of them.
    """

    def refuse_unprinted(what: str, without: list[Message], tools: list | None = tools) -> None:
        try:
            printed = template.render(without, tools)[0] != text
        except UserError:
            printed = True  # the template cannot do without it
        if not printed:
            raise AvoidableError(
                f"{template.name} prints nothing of {what}; write one that does, or leave it out",
                " (data.ignore_fields)",
            )

    def changed(index: int, **fields: Any) -> list[Message]:
        return [*messages[:index], {**messages[index], **fields}, *messages[index + 1 :]]

    if tools:
        refuse_unprinted("field tools", list(messages), None)
    contents = [_texts(message, index) for index, message in enumerate(messages)]
    words = _printed_words(messages, tools, template)
    for index, message in enumerate(messages):
        for number, part in enumerate(contents[index]):
            known = part.strip() in text if words is None else _word(index, number) in words
            if part.strip() and not known:
                what = f"field messages[{index}].content (role {message['role']})"
                refuse_unprinted(what, changed(index, content=""))
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list) and str(content) in text:
            raise UserError(
                f"{template.name} takes no list of parts; write messages[{index}].content as text"
            )
        for number, call in enumerate(calls if isinstance(calls, list) else ()):
            if _is_quoted(call, text):
                raise UserError(
                    f"{template.name} prints field messages[{index}].tool_calls[{number}] with its "
                    "arguments in quotes; write them as an object, not as text"
                )
            if len(calls) == 1:
                continue
            others = [*calls[:number], *calls[number + 1 :]]
            what = f"field messages[{index}].tool_calls[{number}]"
            refuse_unprinted(what, changed(index, tool_calls=others))
    names = {name for message in messages for name in message if has_content(message[name])}
    for name in sorted(names - {"role", "content", *_LINKS}):
        if name == "name" and all(m["role"] == "tool" for m in messages if name in m):
            continue  # the call says it
        same = _REASONING if name in _REASONING else (name,)
        without = [{n: v for n, v in m.items() if n not in same} for m in messages]
        refuse_unprinted(f"field {name} of the messages", without)


def _is_quoted(call: Any, text: str) -> bool:
    """Returns whether the arguments of a tool call are text, and stand as a JSON string in `text`.

    A model would learn to call with a string in the place of an object.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str) or not arguments.lstrip().startswith("{"):
        return False
    return json.dumps(arguments, ensure_ascii=False) in text


def _word(index: int, number: int) -> str:
    """Returns a word that stands for a part of a message's content; `_WORD` finds such words."""
    return f"zq{index}x{number}qz"


_WORD = re.compile(r"zq\d+x\d+qz")


def _printed_words(
    messages: Sequence[Message], tools: list | None, template: ChatTemplate
) -> set[str] | None:
    """Returns which words the template prints, if each part of a content is a word of its own.

    A content may also stand elsewhere in the text by chance: the word does not. Returns None where
    the template refuses such contents.
    """
    marked = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = enumerate(content)
            content = [{**part, "text": _word(index, number)} for number, part in parts]
        elif content:
            content = _word(index, 0)
        marked.append(message if content is None else {**message, "content": content})
    try:
        return {*_WORD.findall(template.render(marked, tools)[0])}
    except UserError:
        return None


def _texts(message: Message, index: int) -> list[str]:
    """Returns the texts of a content, which is text, a list of text parts, or absent.

    Raises:
      UserError: the message says nothing, or its content is of another form.
    """
    content, field = message.get("content"), f"messages[{index}].content"
    if content is None:
        if not any(has_content(message[name]) for name in message.keys() - {"role", *_LINKS}):
            raise UserError(f"field {field} is missing; write the text of the turn")
        return []
    if not isinstance(content, list):
        return [checked_text(content, field)]
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(
                f"field {field} must be text, or a list of parts that are "
                'text: {"type": "text", "text": "…"}'
            )
        for name, value in part.items():
            if name not in ("type", "text") and has_content(value):
                raise AvoidableError(
                    f"field {field}[{number}].{name} is not used; remove it",
                    ", or leave it out (data.ignore_fields)",
                )
    return [checked_text(part["text"], field) for part in content]
