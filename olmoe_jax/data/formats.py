"""Rows of every accepted format -> text -> token ids, with a mark on the tokens that train.

The texts and the masking are those of the PyTorch reference, down to its spaces. The rule that
masks a prompt is `count_prompt_tokens`.
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
RULES_VERSION = 1

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
    """The text of a row and the places where training on the text starts and stops.

    Each boundary is a number of characters of `text`: the ends of the first prompt, the first
    answer, the second prompt, and so on, up to that of the last prompt. What comes after an odd
    number of boundaries trains. `count_prompt_tokens` places a boundary among the tokens.
    """

    text: str
    boundaries: tuple[int, ...]


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


def count_prompt_tokens(prefix: Sequence[int], tokens: Sequence[int] | np.ndarray) -> int:
    """Returns how many of `tokens` come before a boundary: the rule that masks a prompt.

    The rule counts: the text has as many tokens before the boundary as the prefix has when the
    prefix is tokenised alone. The PyTorch reference counts in the same way. The count is off where
    the prefix has other tokens alone than in the text:

    - The tokenizer merges the prefix's last token with the start of the answer: the merged token
      counts as prompt and does not train.
    - It merges the prefix's last k + 1 tokens with the start of the answer: the boundary comes k
      tokens too late, and the next k tokens, all answer, do not train either.
    - The prefix has k tokens fewer alone than in the text: the boundary comes k tokens too early,
      and the last k tokens of the prompt train.

    A text that is cut before the boundary has no token behind the boundary.

    Args:
      prefix: token ids of the text up to the boundary, tokenised alone.
      tokens: token ids of the whole text, possibly cut.
    """
    return min(len(prefix), len(tokens))


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
) -> Iterator[TokenizedExample]:
    """Yields the example of each row.

    A text longer than `max_seq_length` tokens loses its end. No token is put before a text.
    """
    # Twice as many as an example keeps: the last tokens of a cut text may be others than the whole
    # text has there.
    enough = 2 * max_seq_length
    tokens = [
        np.asarray(ids[:max_seq_length], np.int32)
        for ids in _token_ids([row.text for row in rows], tokenizer, enough)
    ]
    token_boundaries: list[list[int]] = [[] for _ in rows]
    unfinished = list(range(len(rows)))
    while unfinished:
        prefixes = [
            rows[i].text[: rows[i].boundaries[len(token_boundaries[i])]] for i in unfinished
        ]
        ids = _token_ids(prefixes, tokenizer, enough)
        for i, prefix in zip(unfinished, ids, strict=True):
            token_boundaries[i].append(count_prompt_tokens(prefix, tokens[i]))
        unfinished = [
            i
            for i, prefix in zip(unfinished, ids, strict=True)
            # Behind such a prefix, all boundaries are behind the example: a longer prefix has fewer
            # tokens only where the tokenizer merges the last ones of the shorter.
            if len(token_boundaries[i]) < len(rows[i].boundaries)
            and len(prefix) < max_seq_length + _MOST_MERGED
        ]
    for ids, counts in zip(tokens, token_boundaries, strict=True):
        # A longer prefix may have fewer tokens, hence the sorting.
        passed = np.searchsorted(np.sort(counts), np.arange(len(ids)), side="right")
        # An answer has an odd number of boundaries before it.
        yield TokenizedExample(ids, in_loss=passed % 2 == 1, prompt_length=counts[0])


_MOST_MERGED = 64
"""More tokens than a tokenizer merges into one when a text goes on."""


def _token_ids(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", enough: int
) -> list[list[int]]:
    """Returns the token ids of each text; of a long text, the first `enough` or more.

    The tokenizer takes 300 bytes for each byte of a text.
    """

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    size = max(_WHOLE_TEXT, min(8 * enough, LONG_TEXT))
    sizes = [size] * len(texts)
    found = ids([text[:size] for text in texts])
    for index, text in enumerate(texts):
        while sizes[index] < len(text) and len(found[index]) < enough:
            sizes[index] *= 2
            found[index] = ids([text[: sizes[index]]])[0]
    return found


def _join(before: str, after: str) -> str:
    # The reference looks at these three characters alone: other whitespace gets a space too.
    whitespace = (" ", "\n", "\t")
    separated = before.endswith(whitespace) or after.startswith(whitespace)
    return before + after if separated else f"{before} {after}"


def _prompt_completion(row: Fields, eos: str) -> FormattedRow:
    prompt = _text(row, "prompt")
    return FormattedRow(_join(prompt, _text(row, "completion")) + eos, (len(prompt),))


def _prompt_answer(row: Fields, eos: str) -> FormattedRow:
    prompt = _text(row, "prompt")
    return FormattedRow(_join(prompt, _answer(row)) + eos, (len(prompt),))


def _question_answer(row: Fields, eos: str) -> FormattedRow:
    prompt = f"Question: {_text(row, 'question')}\nAnswer:"
    return FormattedRow(prompt + _answer(row) + eos, (len(prompt),))


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
    return FormattedRow(prompt + answer + eos, (len(prompt),))


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
    prompt = template.format(**fields)
    return FormattedRow(prompt + _text(row, "output") + eos, (len(prompt),))


def _messages(row: Fields, eos: str) -> FormattedRow:
    """Returns a conversation, in which every assistant turn ends in `eos` and trains.

    One user and one assistant turn give exactly the text of a prompt and its completion. Further
    turns are joined by the same rule. A system turn goes in front of the first user turn, with a
    newline between the two.
    """
    pieces, ends, last = [], [0], ""
    for index, content in enumerate(_turns(row["messages"])):
        piece = _join(last, content).removeprefix(last) if index else content
        if index % 2:
            piece += eos
        pieces.append(piece)
        ends.append(ends[-1] + len(piece))
        last = piece[-1:] or last
    return FormattedRow("".join(pieces), tuple(ends[1:-1]))


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
