"""Rows of every accepted format -> text -> token ids, with a mark on the tokens that train.

The texts are those of the PyTorch reference, down to its spaces. So are the masks, but for a token
that holds the end of a prompt and the start of an answer: here it trains.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from olmoe_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of a data set's identity: increase it whenever the same row would give other tokens or
# another mask. A run then refuses to continue on the changed examples and says why.
RULES_VERSION = 2

Fields = Mapping[str, Any]  # a row of a data file, by the names of its columns

ACCEPTED_FIELDS = (
    "prompt + completion; prompt + answer or answers; question + answer or answers; "
    "question + choices + answer (the index of a choice); instruction + output (input optional); "
    "messages (an optional system turn, then user and assistant turns)"
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
class FormattedRow:
    """The text of a row and the parts of it that train.

    Each span is (start, end) in characters of `text`, in their order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of a row.

    Attributes:
      tokens: int32 [n].
      in_loss: bool [n], the tokens that train: the loss covers them. The loss leaves out the first
        token of an example in any case, because no token before it predicts it.
      prompt_length: how many tokens come before the first answer, at most n. A conversation of
        several turns has one prompt too: everything before its first assistant turn.
    """

    tokens: np.ndarray
    in_loss: np.ndarray
    prompt_length: int

    def prompt_and_answer(self, eos_id: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the tokens of the prompt and those of the first answer, without its eos.

        The first answer ends at the first eos after the prompt, in a conversation too. None: the
        example holds no eos there, because the text was cut.
        """
        prompt, rest = np.split(self.tokens, [self.prompt_length])
        ends = np.flatnonzero(rest == eos_id)
        return (prompt, rest[: ends[0]]) if len(ends) else None


@dataclass(frozen=True)
class EncodedRow(TokenizedExample):
    """The tokens of a row, and what became of it on the way.

    Attributes:
      straddling: bool [n], the tokens that hold the end of a prompt and the start of an answer.
    """

    straddling: np.ndarray


def format_row(row: Fields, eos: str) -> FormattedRow:
    """Returns the text of `row`, `eos` included.

    A field that is null counts as absent, because the hub fills missing columns with null.

    Raises:
      UserError: the fields are of no accepted format, or a field has the wrong type.
    """
    fields = {name: value for name, value in row.items() if value is not None}
    for required, formatter in _FORMATS:
        if all(name in fields for name in required):
            return formatter(fields, eos)
    found = ", ".join(fields) or "none"
    raise UserError(f"unknown fields (found: {found}); accepted: {ACCEPTED_FIELDS}")


def encode_batch(
    rows: Sequence[FormattedRow], tokenizer: "PreTrainedTokenizerBase", max_seq_length: int
) -> Iterator[EncodedRow]:
    """Yields the tokens of each row.

    A token trains if one of its characters does: also where the tokenizer merges the end of a
    prompt with the start of an answer. A text longer than `max_seq_length` tokens loses its end. No
    token is put before a text.
    """
    # Twice as many as an example keeps: the last tokens of a cut text may be others than the whole
    # text has there.
    encodings = _encode([row.text for row in rows], tokenizer, 2 * max_seq_length)
    for row, (ids, offsets) in zip(rows, encodings, strict=True):
        tokens = np.asarray(ids[:max_seq_length], np.int32)
        starts, ends = np.asarray(offsets[:max_seq_length], np.int64).reshape(-1, 2).T
        # Tokenizers leave the spaces at the start of a token out of its offsets.
        starts = np.minimum(starts, np.append(0, ends)[:-1])
        # The last entry is that of no span: a token before the first span finds it by index -1.
        span_starts, span_ends = np.array([*row.spans, (0, 0)]).T
        span = np.searchsorted(span_starts[:-1], ends) - 1
        in_loss = starts < span_ends[span]
        yield EncodedRow(
            tokens,
            in_loss,
            prompt_length=int(in_loss.argmax()) if in_loss.any() else len(tokens),
            straddling=in_loss & (starts < span_starts[span]),
        )


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", enough: int
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Returns the token ids of each text, and the characters of each token as (start, end).

    Of a long text, these are the first `enough` tokens or more. The tokenizer takes 300 bytes for
    each byte of a text.
    """

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
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
        return [*zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    size = max(_WHOLE_TEXT, min(8 * enough, LONG_TEXT))
    sizes = [size] * len(texts)
    found = encode([text[:size] for text in texts])
    for index, text in enumerate(texts):
        while sizes[index] < len(text) and len(found[index][0]) < enough:
            sizes[index] *= 2
            found[index] = encode([text[: sizes[index]]])[0]
    return found


def _answered(prompt: str, answer: str) -> FormattedRow:
    """Returns the row of a prompt and of what follows it and trains."""
    text = prompt + answer
    return FormattedRow(text, ((len(prompt), len(text)),))


def _after(before: str, text: str) -> str:
    """Returns `text` as it follows `before`: with a space between unless there is whitespace."""
    # The reference looks at these three characters alone: other whitespace gets a space too.
    whitespace = (" ", "\n", "\t")
    separated = before.endswith(whitespace) or text.startswith(whitespace)
    return text if separated else f" {text}"


def _prompt_completion(row: Fields, eos: str) -> FormattedRow:
    prompt = _text(row, "prompt")
    return _answered(prompt, _after(prompt, _text(row, "completion")) + eos)


def _prompt_answer(row: Fields, eos: str) -> FormattedRow:
    prompt = _text(row, "prompt")
    return _answered(prompt, _after(prompt, _answer(row)) + eos)


def _question_answer(row: Fields, eos: str) -> FormattedRow:
    return _answered(f"Question: {_text(row, 'question')}\nAnswer:", _answer(row) + eos)


def _choices(row: Fields, eos: str) -> FormattedRow:
    choices = row["choices"]
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(_CHOICE_NAMES):
        raise UserError(f"field choices must be a list of 1 to {len(_CHOICE_NAMES)} texts")
    texts = [_checked_text(choice, "choices") for choice in choices]
    named = [f"{name}. {text}" for name, text in zip(_CHOICE_NAMES, texts, strict=False)]
    lines = "\n".join(named)
    # The space after the last choice is the reference's.
    prompt = f"Question: {_text(row, 'question').strip()}\n{lines} \nAnswer:"
    answer = named[_choice_index(row["answer"], len(named))]
    return _answered(prompt, answer + eos)


def _choice_index(value: Any, count: int) -> int:
    number = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,2}", number) or int(number) >= count:
        raise UserError(f"field answer must be the index of a choice, 0 to {count - 1}")
    return int(number)


def _instruction(row: Fields, eos: str) -> FormattedRow:
    template = _INSTRUCTION_WITH_INPUT_PROMPT if row.get("input") else _INSTRUCTION_PROMPT
    fields = {"instruction": _text(row, "instruction")}
    if row.get("input"):
        fields["input"] = _text(row, "input")
    return _answered(template.format(**fields), _text(row, "output") + eos)


def _messages(row: Fields, eos: str) -> FormattedRow:
    """Returns a conversation, in which every assistant turn ends in `eos` and trains.

    One user and one assistant turn give exactly the text of a prompt and its completion. Further
    turns are joined by the same rule. A system turn goes in front of the first user turn, with a
    newline between the two.
    """
    pieces, spans, length, last = [], [], 0, ""
    for index, content in enumerate(_turns(row["messages"])):
        piece = _after(last, content) if index else content
        if index % 2:
            piece += eos
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
        last = piece[-1:] or last
    return FormattedRow("".join(pieces), tuple(spans))


def _turns(messages: Any) -> list[str]:
    """Returns the contents of the turns, user and assistant alternately."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError("field messages must be a list of objects with role and content")
    roles = [message.get("role") for message in messages]
    contents = [_checked_text(message.get("content"), "content") for message in messages]
    if roles[:1] == ["system"]:
        system, roles, contents = contents[0], roles[1:], contents[1:]
        contents[:1] = [f"{system}\n{content}" for content in contents[:1]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            "field messages must hold an optional system turn, then user and assistant turns "
            "that alternate and end with the assistant's"
        )
    return contents


def _answer(row: Fields) -> str:
    if "answer" in row:
        return _text(row, "answer")
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise UserError("field answers must be a list with at least one text")
    return _checked_text(answers[0], "answers")


def _text(row: Fields, field: str) -> str:
    return _checked_text(row[field], field)


def _checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"field {field} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise UserError(f"field {field} is not valid Unicode: {error.reason}") from error
    return value


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Fields, str], FormattedRow]], ...] = (
    (("prompt", "completion"), _prompt_completion),
    (("messages",), _messages),
    (("question", "choices", "answer"), _choices),
    (("question", "answer"), _question_answer),
    (("question", "answers"), _question_answer),
    (("instruction", "output"), _instruction),
    (("prompt", "answer"), _prompt_answer),
    (("prompt", "answers"), _prompt_answer),
)
