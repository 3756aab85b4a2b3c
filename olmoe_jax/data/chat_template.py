"""Chat templates: which one a run has, and its rendering by transformers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of a tokenizer, which transformers renders."""

    name: str  # what error messages call the template
    sources: Mapping[str, str]  # Jinja: "default" and, for conversations with tools, "tool_use"
    tokenizer: "PreTrainedTokenizerBase"  # whose special tokens the template may print

    def source(self, tools: list | None = None) -> str:
        """Returns the Jinja text for a conversation."""
        return self.sources.get("tool_use" if tools else "default", self.sources["default"])

    def has_marks(self, tools: list | None) -> bool:
        """Returns whether the template marks what an assistant writes: {% generation %}."""
        return _MARKS.search(_COMMENT.sub("", self.source(tools))) is not None

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

        With `prompt`, the text ends with the begin of an assistant's turn.

        Raises:
          UserError: the template is wrong, or refuses the messages.
        """
        from jinja2 import TemplateSyntaxError
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
        except TemplateSyntaxError as error:
            reason = first_line(error)
            raise UserError(f"{self.name}: line {error.lineno} is not Jinja: {reason}") from None
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
            text, _ = self.render([as_message("user", "A"), as_message("assistant", mark)])
        except UserError:  # a conversation will say what is wrong
            return [end]
        if mark not in text:
            return [end]
        rest = self.tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
        added = self.tokenizer.added_tokens_decoder
        return sorted({end, *[i for i in rest if i in added and added[i].special][:1]})


def chat_template(spec: str | None, tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate | None:
    """Returns the template that `spec` names: "auto" (the tokenizer's own), a file or None.

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
            "default; write one to a file, and name the file (chat_template)"
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


def as_message(role: str, content: str) -> Message:
    """Returns a message."""
    return {"role": role, "content": content}
