"""Chats: prompts are the texts that training made, history, Ctrl-C, and `generate --chat`."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT, message_of, run_module

from olmoe_jax.data import hub_dataset
from olmoe_jax.data.chat_template import chat_template
from olmoe_jax.data.formats import RowRules, format_row
from olmoe_jax.data.reading import read_source
from olmoe_jax.generation import chat, command
from olmoe_jax.generation.stop_strings import settled
from olmoe_jax.sources import Source

TEMPLATES = ROOT / "tests/data/chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho!"}


def format_of(name, tokenizer):
    spec = None if name == "none" else str(TEMPLATES / f"{name}.jinja")
    rules = RowRules(chat_template(spec, tokenizer))
    return chat.ChatFormat(rules, tokenizer, rules.ends(tokenizer.eos_token_id))


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_a_prompt_is_what_trains_before_the_answer(name, tokenizer):
    """The prompt of a conversation is the text before the span of its last answer, as trained."""
    format = format_of(name, tokenizer)
    messages = [USER, ANSWER, {"role": "user", "content": " 1\n2 "}]
    row = {"messages": [*messages, {"role": "assistant", "content": "12"}]}
    rules = RowRules(format.rules.template, "last_answer")
    trained = format_row(row, tokenizer.eos_token, rules)
    prompt = format.prompt(messages)
    assert prompt == trained.text[: trained.spans[0][0]]
    text = trained.text[trained.spans[0][0] :].partition("12")[0] + "12"
    if name != "qwen3":  # which puts an empty reasoning in front
        assert format.answer(messages, None, prompt, text)["content"] == "12"


class Scripted:
    """`olmoe_jax.generate` with given texts; keeps the prompts."""

    def __init__(self, *texts):
        self.texts, self.prompts = list(texts), []

    def __call__(self, prompts, watch=None, progress=False):
        self.prompts += prompts
        text = self.texts.pop(0)
        for length in range(1, len(text) + 1) if watch else ():
            watch(text[:length])
        return [text]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "none"])
def test_a_session_keeps_what_was_said(name, tokenizer):
    """Every prompt begins with the prompt before it and the model's text, to the last space."""
    format = format_of(name, tokenizer)
    generate = Scripted(" Ho!" if name in ("mistral", "none") else "Ho!", "2")
    session = chat.Session(format, generate, "Be brief.", 10_000)
    assert session.say("Hi?") == "Ho!"
    assert session.say("1?") == "2"
    system = {"role": "system", "content": "Be brief."}
    first, second = generate.prompts
    assert second == format.prompt([system, USER, ANSWER, {"role": "user", "content": "1?"}])
    assert second.startswith(first + ("Ho!" if first.endswith(("\n", ">")) else " Ho!"))
    assert first == format.prompt([system, USER])


def test_ctrl_c_stops_an_answer(tokenizer, capsys):
    """What was written stays in the conversation; a message without an answer is forgotten."""

    def pressing(prompts, watch):
        watch("Once up")
        signal.raise_signal(signal.SIGINT)
        watch("Once upon a\ufffd")
        raise AssertionError("the answer goes on")

    former = signal.getsignal(signal.SIGINT)
    session = chat.Session(format_of("chatml", tokenizer), pressing, None, 10_000)
    with chat._ctrl_c() as pressed:
        screen = chat._Screen([], pressed)
        screen.finish(session.say("Tell me.", screen.show))
    assert signal.getsignal(signal.SIGINT) == former
    assert capsys.readouterr().out == "Once upon a\n"
    assert [m["content"] for m in session._turns] == ["Tell me.", "Once upon a"]

    def at_once(prompts, watch):
        raise KeyboardInterrupt

    session = chat.Session(format_of("chatml", tokenizer), at_once, None, 10_000)
    assert session.say("Tell me.", screen.show) == ""
    assert session._turns == []
    with pytest.raises(KeyboardInterrupt):
        session.say("Tell me.")  # in a pipe


def test_an_answer_appears_as_it_is_written(capsys):
    screen = chat._Screen(["END"], [])
    shown = []
    for text in (" ", " a", " a\ufffd", " a\u4e0aE", " a\u4e0aEN", " a\u4e0a"):
        screen.show(text)
        shown.append(capsys.readouterr().out)
    screen.finish("a\u4e0a")
    assert shown == ["", "a", "", "\u4e0a", "", ""]
    assert capsys.readouterr().out == "\n"
    assert settled("x EN", ["END", "N"]) == "x "
    assert settled("x END", []) == "x END"


def test_a_long_conversation_loses_its_begin(tokenizer, capsys):
    format = format_of("chatml", tokenizer)
    system, last = {"role": "system", "content": "s"}, {"role": "user", "content": "3"}
    kept = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}]
    room = len(format.prompt([system, *kept, last]))
    generate = Scripted("a", "b", "c")
    session = chat.Session(format, generate, "s", room)
    assert [session.say(text) for text in "123"] == ["a", "b", "c"]
    assert generate.prompts[2] == format.prompt([system, *kept, last])
    assert "its first 2 turns are left out" in capsys.readouterr().err


def rows(tmp_path, *lines):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "unknown fields (found: prompt); write messages"),
        ({"messages": "x"}, "field messages must be a list of objects"),
        ({"messages": []}, "must end with the turn that is to be answered"),
        ({"messages": [USER, ANSWER]}, "leave an assistant's last turn out"),
        ({"messages": [USER], "score": 1}, "rows of messages, tools, system; remove it"),
        ({"messages": [{"role": "system", "content": "x"}, USER]}, "leave --system out"),
        ({"messages": [USER], "tools": [{}]}, "prints nothing of field tools"),
        ({"messages": [{**USER, "mood": "x"}]}, "prints nothing of field mood"),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "x", "lang": "en"}]}]},
            "field messages[1].content[0].lang is not used; remove it",
        ),
    ],
)
def test_rows_that_are_refused(row, words, tokenizer, tmp_path):
    file = rows(tmp_path, {"messages": [USER]}, row)
    chatml = format_of("chatml", tokenizer)
    message = message_of(chat.read_conversations, [], file, "Be brief.", chatml)
    assert message.startswith(f"{file}: line 2: ")
    assert words in message
    assert "data." not in message  # the command has no fields of a config


def test_what_the_command_cannot_set_is_not_advised(tokenizer, tmp_path, monkeypatch):
    """Training says of the same rows which field of the config helps."""
    file, plain = (
        rows(tmp_path, {"messages": [{**USER, "mood": "x"}]}),
        format_of("none", tokenizer),
    )
    message = message_of(chat.read_conversations, [], file, None, plain)
    assert message.endswith("name one (chat_template), or leave the field out")
    two = SimpleNamespace(chat_template={"a": "x"}, name_or_path="m")
    assert message_of(chat_template, "auto", two).endswith("and name the file (chat_template)")
    asks = ValueError("Config name is missing. Please pick one among: ['a', 'b']")

    def by_name(*_):
        raise asks

    monkeypatch.setattr(hub_dataset, "_by_name", by_name)
    message = message_of(chat.read_conversations, [], "o/two", None, plain)
    assert message == "o/two: it has several configurations, a, b; write OWNER/NAME:FILE"
    message = message_of(list, read_source(Source("o/two")))
    assert message.endswith("write OWNER/NAME:FILE, or config=NAME (data.hub_config)")


def test_weights_of_turns_matter_to_training_alone(tokenizer):
    format, weighted = format_of("chatml", tokenizer), [{**USER, "weight": 1}]
    assert format.prompt(weighted) == format.prompt([USER])
    assert "weight must be 0 or 1" in message_of(format.prompt, [{**USER, "weight": 2}])


def test_rows_that_are_not_there(tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n \n")))
    message = message_of(chat.read_conversations, [], "-", None, format_of("none", tokenizer))
    assert message == "standard input is empty; write a row of messages on each line"


def test_a_line_of_the_standard_input_that_is_no_row(tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Hi?\n")))
    message = message_of(chat.read_conversations, [], "-", None, format_of("none", tokenizer))
    assert message.startswith("standard input: line 1: not JSON (expected value at column 1); ")
    assert "write one JSON object a line" in message


def test_a_line_of_the_standard_input_that_is_not_utf8(tokenizer, monkeypatch):
    """The message counts the lines of the input, in a file of rows and in a session."""
    format = format_of("none", tokenizer)
    session = chat.Session(format, Scripted("a"), None, 10_000)
    for read in (
        lambda: chat.read_conversations([], "-", None, format),
        lambda: chat.converse(session, ()),
    ):
        buffer = io.BytesIO(b'{"messages": []}\n\xff\n')
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer, isatty=lambda: False))
        words = "standard input: not UTF-8 text at line 2; save it as UTF-8"
        assert message_of(read) == words


def test_rows_keep_their_fields(tokenizer, tmp_path):
    row = {"id": 7, "messages": [USER], "system": "Be brief."}
    (found,) = chat.read_conversations([], rows(tmp_path, row), None, format_of("none", tokenizer))
    assert found.prompt == "Be brief.\nHi?"
    assert json.loads(chat.as_json(found, ANSWER)) == row | {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--system", "s"], "--system is for chats: add --chat"),
        (["--prompt", "x", "--chat_template", "none"], "--chat_template is for chats"),
        (["--chat"], "has no chat template; write --chat_template FILE (Jinja), or"),
        (["--chat", "--chat_template", "nowhere"], "nowhere: no such file"),
        (["--chat", "--prompts", "nowhere"], "no chat template"),
    ],
)
def test_mistakes(arguments, words, tiny_model):
    assert words in message_of(command.main, ["--model", str(tiny_model), *arguments])


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, capsys):
    """One message and a file give the same answers."""
    template = ["--chat", "--chat_template", TEMPLATES / "chatml.jinja", "--max_new_tokens", 8]
    common = list(map(str, ["--model", tiny_model, *template]))
    command.main([*common, "--prompt", "Hi?"])
    alone = capsys.readouterr().out
    file = rows(tmp_path, {"messages": [USER]}, {"messages": [USER, ANSWER, USER]})
    code, out, stderr = run_module("olmoe_jax.generate", *common, "--prompts", file)
    assert code == 0, stderr
    found = [json.loads(line)["messages"] for line in out.splitlines()]
    assert found[0] == [USER, {"role": "assistant", "content": alone[:-1]}]
    assert [len(messages) for messages in found] == [2, 4]
    assert "top_p=2" in message_of(command.main, [*common, "--prompt", "x", "--top_p", "2"])


CONTROLLED = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""
"""Runs a module whose keyboard, and so whose Ctrl-C, is the terminal.

A shell lets its background jobs ignore Ctrl-C, and with them a test session and its processes.
"""


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments):
        self.end, other = pty.openpty()
        self.seen = ""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, "olmoe_jax.generate", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdin=other,
            stdout=other,
            stderr=other,
        )
        os.close(other)

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt_to_the_end(self):
        """Presses Ctrl-C at the prompt; again, if the command does not end.

        Python's input() misses a signal between its prompt and its wait for a key.
        """
        for _ in range(5):
            self.type("\x03")
            while select.select([self.end], [], [], 30)[0]:
                try:
                    self.seen += os.read(self.end, 4096).decode()
                except OSError:  # the command has ended
                    return

    def until(self, done, seconds=300):
        """Returns what appears until `done` says of it that it is enough, or the command ends."""
        begin, limit = len(self.seen), time.monotonic() + seconds
        while not done(self.seen[begin:]):
            ready, _, _ = select.select([self.end], [], [], max(0, limit - time.monotonic()))
            assert ready, self.seen
            try:
                self.seen += os.read(self.end, 4096).decode()
            except OSError:  # the command has ended
                break
        return self.seen[begin:]


@pytest.mark.slow
def test_a_session_on_a_terminal(tiny_model):
    """Answers, Ctrl-C during one, Ctrl-C at the prompt; no control sequence of the model's."""
    terminal = Terminal(
        *("--model", tiny_model, "--chat", "--chat_template", "none"),
        *("--temperature", 1, "--max_new_tokens", 900),
    )
    terminal.until(lambda text: text.endswith("> "))
    terminal.type("Hi?\n")
    terminal.until(lambda text: len(text) > len("Hi?\r\n") + 20)
    terminal.type("\x03")
    written = terminal.until(lambda text: text.endswith("\r\n> "))
    assert len(written) < 1000, "Ctrl-C stopped nothing"
    terminal.interrupt_to_the_end()
    assert terminal.process.wait(60) == 0
    assert "\x1b" not in terminal.seen
