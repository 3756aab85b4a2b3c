"""Chat templates: ids and masks against transformers, and what is refused."""

import random
from pathlib import Path

import numpy as np
import pytest

from olmoe_jax.data.chat_template import chat_template, write_template
from olmoe_jax.data.formats import encode_batch, format_row, row_rules
from olmoe_jax.errors import UserError

TEMPLATES = Path(__file__).with_name("chat_templates")
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<think>", "</think>"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer_dir, shared_tokenizer_dir):
    """A tokenizer with the special tokens of all templates."""
    from olmoe_jax.data import load_tokenizer

    tokenizer = load_tokenizer(str(shared_tokenizer_dir or tokenizer_dir))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL})
    return tokenizer


@pytest.fixture(scope="module")
def shared_tokenizer_dir():
    import os

    shared = os.environ.get("OLMOE_JAX_SHARED")
    return Path(shared) / "data/tokenizer" if shared else None


def rules_of(name, tokenizer, **settings):
    return row_rules(tokenizer, str(TEMPLATES / f"{name}.jinja"), **settings)


def encode(row, rules, tokenizer):
    formatted = format_row(row, tokenizer.eos_token, rules)
    (example,) = encode_batch([formatted], tokenizer, 100_000)
    return example


def trained(row, rules, tokenizer):
    """The texts of the parts that train."""
    formatted = format_row(row, tokenizer.eos_token, rules)
    return [formatted.text[start:end] for start, end in formatted.spans]


def conversations(count, seed, system=True, tools=False, turns=5, reasoning=False):
    """Random conversations as rows."""
    draw = random.Random(seed)
    words = ["so", "Ja!", "x = 1", "é\u4e0a", "\U0001d6fc", "a  b", "line\nline", "<s>", "1,234"]

    def text():
        return " ".join(draw.choices(words, k=draw.randint(1, 6)))

    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
        with_tools = tools and draw.random() < 0.5
        for _ in range(draw.randint(1, turns)):
            messages.append({"role": "user", "content": text()})
            if with_tools and draw.random() < 0.5:
                messages.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
                if reasoning:
                    messages[-1]["reasoning_content"] = text()
                messages.append({"role": "tool", "content": text(), "tool_call_id": "1"})
            messages.append({"role": "assistant", "content": text()})
            if reasoning:
                messages[-1]["reasoning_content"] = text()
        yield {"messages": messages, **({"tools": TOOLS} if with_tools else {})}


def by_prefixes(row, name, tokenizer):
    """Ids and mask as transformers renders the conversation and its prefixes."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    messages = row["messages"]

    def render(count, prompt):
        return tokenizer.apply_chat_template(
            messages[:count],
            tools=row.get("tools"),
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
        )

    text = render(len(messages), False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = np.zeros(len(encoded["input_ids"]), bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, until = render(index, True), render(index + 1, False)
            assert text.startswith(before)
            assert text.startswith(until)
            ends = [end for _, end in encoded["offset_mapping"]]
            first = next(i for i, end in enumerate(ends) if end > len(before))
            last = next(i for i, end in enumerate(ends) if end >= len(until))
            mask[first : last + 1] = True
    return encoded["input_ids"], mask


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("tulu", {}),
        ("chatml", {}),
        ("llama3", {"tools": True}),
        ("gemma", {"system": False}),
        ("mistral", {}),
        ("qwen3", {"tools": True, "turns": 1, "reasoning": True}),
    ],
)
def test_masks_by_prefixes(name, kinds, chat_tokenizer):
    rules = rules_of(name, chat_tokenizer)
    for row in conversations(200, 0, **kinds):
        example = encode(row, rules, chat_tokenizer)
        ids, mask = by_prefixes(row, name, chat_tokenizer)
        assert example.tokens.tolist() == ids
        np.testing.assert_array_equal(example.in_loss, mask)


def test_masks_by_generation_marks(chat_tokenizer):
    rules = rules_of("chatml_marked", chat_tokenizer)
    template = rules.template.source()
    for row in conversations(200, 1):
        example = encode(row, rules, chat_tokenizer)
        expected = chat_tokenizer.apply_chat_template(
            row["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert example.tokens.tolist() == expected["input_ids"]
        assert example.in_loss.tolist() == [bool(m) for m in expected["assistant_masks"]]


@pytest.mark.parametrize("answer", ["Yo", "  Yo"])
@pytest.mark.parametrize("name", ["chatml", "chatml_marked"])
def test_a_token_of_generation_prompt_and_answer_trains(name, answer, tokenizer_dir):
    from tokenizers import processors

    from olmoe_jax.data import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(["t\n" + answer[:1]])
    row, rules = chat(USER, ("assistant", answer, {})), rules_of(name, tokenizer)
    ((start, _),) = format_row(row, tokenizer.eos_token, rules).spans
    example = encode(row, rules, tokenizer)
    (straddling,) = np.flatnonzero(example.straddling)
    assert tokenizer.decode(example.tokens[straddling]) == "t\n" + answer[:1]
    assert example.in_loss[straddling]
    assert example.prompt_length == straddling == start - 2


def chat(*turns, **fields):
    """A row whose turns are (role, content, other fields)."""
    messages = [{"role": role, "content": content, **more} for role, content, more in turns]
    return {"messages": messages, **fields}


USER, BAD = ("user", "Hi", {}), ("assistant", "BAD", {"weight": 0})
ANSWER = ("assistant", "Yes", {})
GOOD = ("assistant", "Good.", {"weight": 1, "train": True})


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"training": False}])
@pytest.mark.parametrize("name", ["chatml", "chatml_marked", None])
def test_excluded_turns_do_not_train(name, field, chat_tokenizer):
    rules = rules_of(name, chat_tokenizer) if name else row_rules(chat_tokenizer, None)
    row = chat(USER, ("assistant", "BAD", field), USER, GOOD)
    (text,) = trained(row, rules, chat_tokenizer)
    assert text.strip().startswith("Good.")
    everything = rules_of(name, chat_tokenizer, train_on="all") if name else None
    if everything:
        texts = trained(row, everything, chat_tokenizer)
        assert "BAD" not in "".join(texts)
        assert "Hi" in texts[0]


@pytest.mark.parametrize("name", ["chatml", "chatml_marked"])
def test_train_on(name, chat_tokenizer):
    row = chat(("system", "Be.", {}), USER, ("assistant", "A1", {}), USER, ("assistant", "A2", {}))
    end = "" if name.endswith("marked") else "\n"
    for train_on, expected in {
        "answers": [f"A1<|im_end|>{end}", f"A2<|im_end|>{end}"],
        "last_answer": [f"A2<|im_end|>{end}"],
    }.items():
        rules = rules_of(name, chat_tokenizer, train_on=train_on)
        assert trained(row, rules, chat_tokenizer) == expected
    rules = rules_of(name, chat_tokenizer, train_on="all")
    (text,) = trained(row, rules, chat_tokenizer)
    assert text.startswith("<|im_start|>system\nBe.")
    assert text.endswith("A2<|im_end|>\n")


@pytest.mark.parametrize("name", ["chatml", "chatml_marked", None])
def test_where_all_trains_any_turn_may_be_excluded(name, chat_tokenizer):
    rules = rules_of(name, chat_tokenizer, train_on="all") if name else None
    rules = rules or row_rules(chat_tokenizer, None, train_on="all")
    system, asked = ("system", "Be.", {"train": False}), ("user", "Hi", {"weight": 0})
    row = chat(system, asked, GOOD, ("user", "More?", {"train": True}), BAD)
    text = "".join(trained(row, rules, chat_tokenizer))
    assert [word for word in ("Be.", "Hi", "Good.", "More?", "BAD") if word in text] == [
        "Good.",
        "More?",
    ]


def test_train_on_of_texts(tokenizer):
    row = {"prompt": "ab", "completion": "c"}
    assert trained(row, row_rules(tokenizer, train_on="all"), tokenizer) == ["ab c<|endoftext|>"]
    rules = row_rules(tokenizer, train_on="last_answer")
    turns = chat(USER, ("assistant", "A1", {}), USER, ("assistant", "A2", {}))
    assert trained(turns, rules, tokenizer) == [" A2<|endoftext|>"]


def test_a_template_that_rewrites_earlier_turns(chat_tokenizer):
    row = chat(USER, ("assistant", "A1", {}), USER, ("assistant", "A2", {}))
    with pytest.raises(UserError, match=r"up to messages\[1\] in another way .*last_answer"):
        trained(row, rules_of("qwen3", chat_tokenizer), chat_tokenizer)
    rules = rules_of("qwen3", chat_tokenizer, train_on="last_answer")
    assert trained(row, rules, chat_tokenizer) == ["<think>\n\n</think>\n\nA2<|im_end|>\n"]


LINES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LINES + ASKS.replace("\n", "\n<think>"), r"asks for messages\[1\] by a text that ends in"),
        ("{{ eos_token }}".join([LINES, ASKS]), r"asks for messages\[1\] by a text that ends in"),
        (LINES + "{% if x %}{% generation %}{% endgeneration %}{% endif %}", "marks nothing of 1 "),
    ],
)
def test_a_template_that_does_not_show_the_answer(source, message, chat_tokenizer, tmp_path):
    (tmp_path / "a.jinja").write_text(source)
    rules = row_rules(chat_tokenizer, str(tmp_path / "a.jinja"))
    with pytest.raises(UserError, match=message):
        trained(chat(USER, ANSWER), rules, chat_tokenizer)


def test_a_template_may_end_a_conversation_with_eos(chat_tokenizer, tmp_path):
    end = ASKS.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    (tmp_path / "a.jinja").write_text(LINES + end)
    rules = row_rules(chat_tokenizer, str(tmp_path / "a.jinja"))
    row = chat(USER, ANSWER, USER, ANSWER)
    assert trained(row, rules, chat_tokenizer) == ["Yes\n", "Yes\n<|endoftext|>"]


def test_a_mark_in_a_comment_is_none(chat_tokenizer, tmp_path):
    (tmp_path / "a.jinja").write_text("{# {% generation %} #}" + LINES + ASKS)
    rules = row_rules(chat_tokenizer, str(tmp_path / "a.jinja"))
    assert trained(chat(USER, ANSWER), rules, chat_tokenizer) == ["Yes\n"]


@pytest.mark.parametrize(
    ("source", "turns", "message"),
    [
        (
            LINES.replace("in messages", "in messages if m.role != 'tool'") + ASKS,
            [("assistant", "I look.", {}), ("tool", "5", {}), ("assistant", "It is 5.", {})],
            r"messages\[2\].content \(role tool\)",
        ),
        (LINES + ASKS, [("assistant", "It is 5.", {"thinking": "5"})], "field thinking"),
        (
            LINES.replace("{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or [''])[0] }}")
            + ASKS,
            [("assistant", "", {"tool_calls": [CALL, {**CALL, "id": "b"}]})],
            r"messages\[1\].tool_calls\[1\]",
        ),
    ],
)
def test_what_stands_elsewhere_by_chance_is_not_printed(
    source, turns, message, chat_tokenizer, tmp_path
):
    (tmp_path / "a.jinja").write_text(source)
    rules = row_rules(chat_tokenizer, str(tmp_path / "a.jinja"))
    with pytest.raises(UserError, match=f"prints nothing of .*{message}"):
        trained(chat(USER, *turns), rules, chat_tokenizer)


BROKEN = {"function": {"name": "weather", "arguments": {"city": "\ud800"}}}
QUOTED = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
WEIGHTED = [PARTS[0], {**PARTS[1], "weight": 0}]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chatml", chat(USER, ANSWER, tools=TOOLS), "prints nothing of field tools"),
        ("chatml", chat(USER, ("assistant", "", {"tool_calls": [CALL]})), "of field tool_calls"),
        ("tulu", chat(USER, ("tool", "5 C", {}), ANSWER), r"messages\[1\].content \(role tool"),
        (
            "chatml",
            chat(USER, ("assistant", "4", {"reasoning_content": "2+2"})),
            "reasoning_content",
        ),
        ("chatml", chat(USER, ("assistant", "4", {"thinking": "2+2"})), "field thinking"),
        ("chatml", chat(USER, ("assistant", "4", {"refusal": "2+2"})), "field refusal"),
        ("gemma", chat(("system", "Be.", {}), USER, ANSWER), "System role not supported"),
        ("tulu", chat(("user", PARTS, {}), ANSWER), "does not take the messages"),
        ("chatml", chat(("user", [{"type": "image"}], {}), ANSWER), "parts that are text"),
        ("chatml", chat(USER, ("assistant", "4", {"weight": 0.5})), r"\[1\].weight must be 0 or 1"),
        ("chatml", chat(USER, ("assistant", "4", {"train": 1})), r"\[1\].train must be true or"),
        ("chatml", chat(("user", "Hi", {"train": True}), ANSWER), "a turn that is no assistant's"),
        ("llama3", chat(USER, ("assistant", "", {"tool_calls": [BROKEN]}), tools=TOOLS), "Unicode"),
        ("llama3", chat(USER, ("assistant", "", {"tool_calls": 5}), tools=TOOLS), "does not take"),
        (
            "llama3",
            chat(USER, ("assistant", "", {"tool_calls": [QUOTED]}), tools=TOOLS),
            r"messages\[1\].tool_calls\[0\] with its arguments in quotes; write them as an object",
        ),
        ("chatml", chat(("user", {"a": 1}, {}), ANSWER), "content must be text"),
        ("chatml", chat(("user", None, {}), ANSWER), r"messages\[0\].content is missing"),
        ("chatml", chat(USER, ("assistant", None, {"refusal": ""})), "content is missing"),
        ("chatml", chat(("user", WEIGHTED, {}), ANSWER), r"content\[1\].weight is not used"),
        ("chatml", {"messages": [{"content": "x"}]}, r"messages\[0\].role must be text"),
        (
            None,
            chat(USER, ("assistant", "", {"tool_calls": [CALL]}), tools=TOOLS),
            r"\[1\].tool_calls is used only",
        ),
        (None, chat(USER, ANSWER, tools=TOOLS), "field tools is used only by a chat template"),
        (
            None,
            chat(USER, ("assistant", "", {"tool_calls": [CALL]})),
            r"\[1\].tool_calls is used on",
        ),
        (None, chat(USER, ("assistant", "4", {"reasoning_content": "x"})), r"reasoning_content is"),
        (None, chat(("user", PARTS, {}), ANSWER), "content must be text"),
        (None, chat(USER, ("tool", "5 C", {}), ANSWER), "alternate"),
    ],
)
def test_what_would_not_train_is_refused(name, row, message, chat_tokenizer):
    rules = rules_of(name, chat_tokenizer) if name else row_rules(chat_tokenizer, None)
    with pytest.raises(UserError, match=message):
        trained(row, rules, chat_tokenizer)


def test_arguments_as_text_where_the_template_takes_it(chat_tokenizer):
    rules = rules_of("qwen3", chat_tokenizer, train_on="last_answer")
    rows = [chat(USER, ("assistant", "", {"tool_calls": [c]}), tools=TOOLS) for c in (CALL, QUOTED)]
    assert trained(rows[0], rules, chat_tokenizer) == trained(rows[1], rules, chat_tokenizer)


def test_ignored_fields_are_left_out(chat_tokenizer):
    row = chat(USER, ("assistant", "4", {"reasoning_content": "2+2"}), tools=TOOLS)
    rules = rules_of("chatml", chat_tokenizer, ignore_fields="tools, reasoning_content")
    assert trained(row, rules, chat_tokenizer) == ["4<|im_end|>\n"]


@pytest.mark.parametrize(
    "parts", [PARTS, [{**part, "image_url": None, "id": "1"} for part in PARTS]]
)
def test_parts_go_to_a_template_that_takes_them(parts, chat_tokenizer):
    row = chat(("user", parts, {}), ANSWER)
    formatted = format_row(row, "", rules_of("chatml", chat_tokenizer))
    assert "user\nHi you<|im_end|>" in formatted.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].x.y }}", "does not take the mess"),
        ("\n{% if %}", "line 2 is not Jinja"),
        ("{{ 1 + 'a' }}", "does not take the mess"),
        ("{{ 1/0 }}", "does not take the mess"),
    ],
)
def test_a_template_that_does_not_work_is_one_line(source, message, chat_tokenizer, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text(source)
    with pytest.raises(UserError, match=rf"chat template .*broken\.jinja:? {message}"):
        format_row(chat(USER, ANSWER), "", row_rules(chat_tokenizer, str(file)))


def test_the_tokenizers_own_template(tokenizer_dir):
    from olmoe_jax.data import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert chat_template("auto", tokenizer) is None
    tokenizer.chat_template = "own"
    assert chat_template("auto", tokenizer).source() == "own"
    assert chat_template(None, tokenizer) is None
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    template = chat_template("auto", tokenizer)
    assert (template.source(), template.source([{}])) == ("a", "b")
    tokenizer.chat_template = {"rag": "a"}
    with pytest.raises(UserError, match="no text named default"):
        chat_template("auto", tokenizer)


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("tulu", None)]
)
def test_the_ids_that_end_a_turn(name, end, chat_tokenizer):
    ends = {chat_tokenizer.eos_token_id}
    if end:
        ends.add(chat_tokenizer.convert_tokens_to_ids(end))
    assert {*rules_of(name, chat_tokenizer).template.ends} == ends


def test_exports_carry_the_template_trained_with(chat_tokenizer, tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"chat_template": "old", "x": 1}')
    (tmp_path / "chat_template.json").write_text("{}")
    write_template(tmp_path, rules_of("tulu", chat_tokenizer).template)
    assert settings.read_text().split() == ["{", '"x":', "1", "}"]
    assert not (tmp_path / "chat_template.json").exists()
    own = (tmp_path / "chat_template.jinja").read_text()
    assert own == (TEMPLATES / "tulu.jinja").read_text()
    write_template(tmp_path, None)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer_config.json"]
