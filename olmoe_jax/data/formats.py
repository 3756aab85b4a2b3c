"""Rows of every accepted format -> text -> token ids, with a mark on the tokens that train.

The texts are those of the PyTorch reference, down to its spaces. So are the masks, but for a token
that holds the end of a prompt and the start of an answer: here it trains.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from olmoe_jax.data.chat import (
    BOOKKEEPING,
    FormattedRow,
    after,
    checked_messages,
    joined,
    sharegpt_messages,
    templated,
    trained,
)
from olmoe_jax.data.chat_template import ChatTemplate, Message, chat_template
from olmoe_jax.data.fields import AvoidableError, checked_text, has_content, naming_options
from olmoe_jax.errors import UserError
from olmoe_jax.files import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of a data set's identity: increase it whenever the same row would give other tokens or
# another mask. A run then refuses to continue on the changed examples and says why.
RULES_VERSION = 4

Fields = Mapping[str, Any]  # a row of a data file, by the names of its columns
Tools = list[dict[str, Any]] | None  # the JSON schemas of the tools

ACCEPTED_FIELDS = (
    "prompt + completion; prompt + answer or answers; question + answer or answers; "
    "question + choices + answer (the index of a choice); instruction + output (input, system and "
    "history optional); messages, or conversations of ShareGPT (tools and system optional); text"
)

LONG_TEXT = 1 << 19
"""Characters that are tokenised together."""
_WHOLE_TEXT = 1 << 16
"""Characters of a text that is always tokenised whole."""

_CHOICE_NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The reference builds its prompts from indented triple-quoted strings, so the model sees the
# indentation, the first newline and the last four spaces too.
_INSTRUCTION_PROMPT = """
        Below is an instruction that describes a task. Write a response that appropriately \
completes the request.

        ### Instruction:
        {instruction}

        ### Response:
    """
_INSTRUCTION_WITH_INPUT_PROMPT = """
        Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

        ### Instruction:
        {instruction}

        ### Input:
        {input}

        ### Response:
    """


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of a row, and which of them train.

    The loss leaves out the first token in any case, because no token before it predicts it.
    """

    tokens: np.ndarray  # int32 [n]
    in_loss: np.ndarray  # bool [n]: the loss covers the token

    @property
    def prompt_length(self) -> int:
        """How many tokens come before the first answer, at most n.

        A conversation of several turns has one prompt too: all before its first assistant turn.
        """
        return int(self.in_loss.argmax()) if self.in_loss.any() else len(self.tokens)

    def prompt_and_answer(self, ends: Collection[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the tokens of the prompt and those of the first answer, without its end.

        The first answer ends at the first of the ids `ends` after the prompt, in a conversation
        too. None: the example holds none there, because the text was cut.
        """
        prompt, rest = np.split(self.tokens, [self.prompt_length])
        found = np.flatnonzero(np.isin(rest, [*ends]))
        return (prompt, rest[: found[0]]) if len(found) else None


@dataclass(frozen=True)
class EncodedRow(TokenizedExample):
    """The tokens of a row, and what became of it on the way."""

    straddling: np.ndarray  # bool [n]: the token holds the end of a prompt and an answer's start
    empty: bool  # nothing trains but the end of an answer, and whitespace
    cut: bool  # the text has more tokens than an example keeps
    templated: bool  # a chat template made the text


@dataclass(frozen=True)
class RowRules:
    """How rows become text, and what of it trains."""

    template: ChatTemplate | None = None  # of conversations; None: turns are joined plainly
    train_on: str = "answers"  # or "last_answer", or "all": the whole text
    ignored: frozenset[str] = frozenset(BOOKKEEPING.split(","))  # count as absent, in messages too

    def ends(self, eos: int) -> list[int]:
        """Returns the token ids that end a turn: the tokenizer's eos, and the template's."""
        return sorted({eos, *(self.template.ends if self.template else ())})

    def describe(self) -> str:
        """Returns which template conversations have, in words."""
        return self.template.name if self.template else "none: turns are joined plainly"

    def identity(self) -> dict[str, str]:
        """Returns the named parts that determine a row's text and mask."""
        return {
            "chat template": self.template.digest if self.template else "",
            "train_on": self.train_on,
            "ignored fields": ",".join(sorted(self.ignored)),
        }


def row_rules(
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None = "auto",
    train_on: str = "answers",
    ignore_fields: str = BOOKKEEPING,
) -> RowRules:
    """Returns the rules that the fields of `DataOptions` say.

    Raises:
      UserError: as for `chat_template`.
    """
    ignored = frozenset(name.strip() for name in ignore_fields.split(","))
    return RowRules(chat_template(template, tokenizer), train_on, ignored)


def format_row(row: Fields, eos: str, rules: RowRules | None = None) -> FormattedRow:
    """Returns the text of `row`, `eos` included, and the parts that train.

    A field that is null counts as absent, because the hub fills missing columns with null.

    Raises:
      UserError: the fields are of no accepted format, a field has the wrong type, or says something
        that the format does not use.
    """
    rules = rules or RowRules()
    fields = _fields(row, rules)
    if {"chosen", "rejected"} <= fields.keys():
        raise UserError(
            "a preference row (chosen, rejected): this is supervised training; write rows of "
            "prompt and completion with the chosen answers"
        )
    for required, optional, formatter in _FORMATS:
        if all(name in fields for name in required):
            with naming_options():
                _check_used(fields, rules, *required, *optional)
                return formatter(fields, eos, rules)
    found = ", ".join(fields) or "none"
    raise UserError(f"unknown fields (found: {found}); accepted: {ACCEPTED_FIELDS}")


def conversation(row: Fields, rules: RowRules) -> tuple[list[Message], Tools]:
    """Returns messages and tools of a row of `messages`, which asks for an answer.

    Raises:
      UserError: as for `format_row`.
    """
    fields = _fields(row, rules)
    if "messages" not in fields:
        raise UserError(f"unknown fields (found: {', '.join(fields) or 'none'}); write messages")
    _check_used(fields, rules, "messages", "tools", "system")
    messages = checked_messages(fields["messages"], "messages", rules.ignored)
    return _with_system_and_tools(fields, messages)


def _fields(row: Fields, rules: RowRules) -> dict[str, Any]:
    return {n: value for n, value in row.items() if value is not None and n not in rules.ignored}


def _check_used(fields: Fields, rules: RowRules, *used: str) -> None:
    """Raises `AvoidableError` if a field says something and the format does not use it."""
    unused = [name for name, v in fields.items() if name not in used and has_content(v)]
    if unused:
        several = len(unused) > 1
        what = f"fields {', '.join(unused)} are" if several else f"field {unused[0]} is"
        raise AvoidableError(
            f"{what} not used by rows of {', '.join(used)}; remove {'them' if several else 'it'}",
            f", or set data.ignore_fields={','.join(sorted({*rules.ignored, *unused}))}",
        )


def encode_batch(
    rows: Sequence[FormattedRow], tokenizer: "PreTrainedTokenizerBase", max_seq_length: int
) -> Iterator[EncodedRow]:
    """Yields the tokens of each row.

    A token trains if one of its characters does, a space too: also where the tokenizer merges the
    end of a prompt with the start of an answer. A text longer than `max_seq_length` tokens loses
    its end. No token is put before a text.
    """
    # Twice as many as an example keeps: the last tokens of a cut text may be others than the whole
    # text has there.
    encodings = _encode([row.text for row in rows], tokenizer, 2 * max_seq_length)
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for row, (ids, offsets) in zip(rows, encodings, strict=True):
        tokens = np.asarray(ids[:max_seq_length], np.int32)
        starts, ends = np.asarray(offsets[:max_seq_length], np.int64).reshape(-1, 2).T
        # What a tokenizer drops between two tokens counts as the start of the second.
        starts = np.minimum(starts, np.append(0, ends)[:-1])
        # A template may mark an empty answer; the token around it is the prompt's. The last entry
        # is that of no span: a token before the first span finds it by index -1.
        answers = [(start, end) for start, end in row.spans if start < end]
        span_starts, span_ends = np.array([*answers, (0, 0)]).T
        span = np.searchsorted(span_starts[:-1], ends) - 1
        in_loss = starts < span_ends[span]
        trains = np.flatnonzero(in_loss)
        said = (row.text[starts[i] : ends[i]] for i in trains if ids[i] not in marks)
        cut = len(ids) > max_seq_length
        yield EncodedRow(
            tokens,
            in_loss,
            straddling=in_loss & (starts < span_starts[span]),
            empty=len(trains) > 0 and not cut and not any(map(str.strip, said)),
            cut=cut,
            templated=row.templated,
        )


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", enough: int
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Returns the token ids of each text, and the characters of each token as (start, end).

    Of a long text, these are the first `enough` tokens or more. The tokenizer takes 300 bytes for
    each byte of a text. It is without its post-processor meanwhile.
    """
    backend = tokenizer.backend_tokenizer

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        # A post-processor puts special tokens around a text, which no text here gets, and may leave
        # the spaces at both ends of a token out of its characters.
        processor, backend.post_processor = backend.post_processor, None
        try:
            encoded = tokenizer(
                texts,
                add_special_tokens=False,
                padding=False,
                truncation=False,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
            )
        finally:
            backend.post_processor = processor
        return [*zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    size = max(_WHOLE_TEXT, min(8 * enough, LONG_TEXT))
    sizes = [size] * len(texts)
    found = encode([text[:size] for text in texts])
    for index, text in enumerate(texts):
        while sizes[index] < len(text) and len(found[index][0]) < enough:
            sizes[index] *= 2
            found[index] = encode([text[: sizes[index]]])[0]
    return found


def _answered(rules: RowRules, *turns: tuple[str, str]) -> FormattedRow:
    """Returns the row of prompts and their answers."""
    pieces, spans, length = [], {}, 0
    for index, (prompt, answer) in enumerate(turns):
        spans[index] = (length + len(prompt), length + len(prompt) + len(answer))
        pieces += [prompt, answer]
        length = spans[index][1]
    last = len(turns) - 1
    wanted = {index: index == last or rules.train_on != "last_answer" for index in spans}
    return FormattedRow("".join(pieces), trained(length, spans, wanted, rules.train_on))


def _prompt_completion(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _as_messages(prompt, "prompt", "user", rules)
        answers = _as_messages(completion, "completion", "assistant", rules)
        # The prompt may hold a conversation; what is to be learnt is the completion.
        given = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
        return _conversation(row, [*given, *answers], eos, rules)
    for name in ("tools", "system"):
        if has_content(row.get(name)):
            raise UserError(f"field {name} is not used by texts; write prompt as messages")
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    return _answered(rules, (prompt, after(prompt, completion) + eos))


def _as_messages(value: Any, field: str, role: str, rules: RowRules) -> list[Message]:
    if not isinstance(value, list):
        return [{"role": role, "content": checked_text(value, field)}]
    return checked_messages(value, field, rules.ignored)


def _prompt_answer(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    prompt = _text(row, "prompt")
    return _answered(rules, (prompt, after(prompt, _answer(row)) + eos))


def _question_answer(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    return _answered(rules, (f"Question: {_text(row, 'question')}\nAnswer:", _answer(row) + eos))


def _choices(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    choices = row["choices"]
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(_CHOICE_NAMES):
        raise UserError(f"field choices must be a list of 1 to {len(_CHOICE_NAMES)} texts")
    texts = [checked_text(choice, "choices") for choice in choices]
    named = [f"{name}. {text}" for name, text in zip(_CHOICE_NAMES, texts, strict=False)]
    lines = "\n".join(named)
    # The space after the last choice is the reference's.
    prompt = f"Question: {_text(row, 'question').strip()}\n{lines} \nAnswer:"
    answer = named[_choice_index(row["answer"], len(named))]
    return _answered(rules, (prompt, answer + eos))


def _choice_index(value: Any, count: int) -> int:
    number = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,2}", number) or int(number) >= count:
        raise UserError(f"field answer must be the index of a choice, 0 to {count - 1}")
    return int(number)


def _instruction(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    """Returns instruction and output behind the pairs of `history`, and `system` in front."""
    turns, history = [], row.get("history", [])
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError("field history must be a list of pairs: instruction and output")
        instruction, output = (checked_text(text, "history") for text in pair)
        turns.append((_INSTRUCTION_PROMPT.format(instruction=instruction), output + eos))
    template = _INSTRUCTION_WITH_INPUT_PROMPT if row.get("input") else _INSTRUCTION_PROMPT
    fields = {"instruction": _text(row, "instruction")}
    if row.get("input"):
        fields["input"] = _text(row, "input")
    turns.append((template.format(**fields), _text(row, "output") + eos))
    if row.get("system"):
        turns[0] = (f"{_text(row, 'system')}\n{turns[0][0]}", turns[0][1])
    return _answered(rules, *turns)


def _messages(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    messages = checked_messages(row["messages"], "messages", rules.ignored)
    return _conversation(row, messages, eos, rules)


def _sharegpt(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    messages = checked_messages(sharegpt_messages(row["conversations"]), "", rules.ignored)
    return _conversation(row, messages, eos, rules)


def _conversation(row: Fields, messages: list[Message], eos: str, rules: RowRules) -> FormattedRow:
    messages, tools = _with_system_and_tools(row, messages)
    if rules.template:
        return templated(messages, tools, rules.template, rules.train_on)
    return joined(messages, tools, eos, rules.train_on)


def _with_system_and_tools(row: Fields, messages: list[Message]) -> tuple[list[Message], Tools]:
    if has_content(row.get("system")):
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    tools = row.get("tools")
    if isinstance(tools, str):  # tables have no column for schemas of any shape
        text = checked_text(tools, "tools").strip()
        tools = decode(list[dict[str, Any]], text, "field tools") if text else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError("field tools must be a list of JSON schemas")
    return messages, tools or None


def _whole_text(row: Fields, eos: str, rules: RowRules) -> FormattedRow:
    text = _text(row, "text") + eos
    return FormattedRow(text, ((0, len(text)),))


def _answer(row: Fields) -> str:
    if "answer" in row:
        return _text(row, "answer")
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise UserError("field answers must be a list with at least one text")
    return checked_text(answers[0], "answers")


def _text(row: Fields, field: str) -> str:
    return checked_text(row[field], field)


_Formatter = Callable[[Fields, str, RowRules], FormattedRow]
_FORMATS: tuple[tuple[tuple[str, ...], tuple[str, ...], _Formatter], ...] = (
    (("prompt", "completion"), ("tools", "system"), _prompt_completion),
    (("messages",), ("tools", "system"), _messages),
    (("conversations",), ("tools", "system"), _sharegpt),
    (("question", "choices", "answer"), (), _choices),
    (("question", "answer"), (), _question_answer),
    (("question", "answers"), (), _question_answer),
    (("instruction", "output"), ("input", "system", "history"), _instruction),
    (("prompt", "answer"), (), _prompt_answer),
    (("prompt", "answers"), (), _prompt_answer),
    (("text",), (), _whole_text),
)
"""The fields of each format: those that it needs, those that it may have, and what reads them."""
