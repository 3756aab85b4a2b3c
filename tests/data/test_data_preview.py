import json
import subprocess
import sys

import pytest
from helpers import message_of

from olmoe_jax.data.__main__ import main
from olmoe_jax.errors import UserError


@pytest.fixture
def arguments(tmp_path, tokenizer_dir):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "p" * 30, "completion": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["preview", f"--data={path}", f"--tokenizer={tokenizer_dir}", "--max_seq_length=10"]


def test_json(arguments, tokenizer, capsys):
    main([*arguments, "--json"])
    kept, dropped = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    ids = tokenizer("abc de<|endoftext|>")["input_ids"]
    assert kept == {
        "kept": True,
        "input_ids": ids,
        "labels": [-100] * 3 + ids[3:],
        "trains": [False] * 3 + [True] * 4,
    }
    assert not dropped["kept"]
    assert dropped["labels"] == [-100] * 10


def test_labels_are_the_references(arguments, olmoe_tokenizer, shared, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "Yes or no: ", "completion": "yes"}')
    main([*arguments, f"--tokenizer={shared / 'data/tokenizer'}", "--json"])
    row = json.loads(capsys.readouterr().out)
    ids = olmoe_tokenizer(" yes<|endoftext|>")["input_ids"]
    assert row["input_ids"][-2:] == ids
    assert row["labels"][-3:] == [-100, -100, ids[1]]
    assert row["trains"][-3:] == [False, True, True]


def test_text(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "--- row 1: 7 tokens, 4 to train on",
        "abc⟦ de<|endoftext|>⟧",
        "--- row 2: 10 tokens, dropped: none to train on",
        "p" * 10,
        "rows: 1 of 2 rows dropped, 1 cut at 10 tokens, of which 0 lost the end of an answer; "
        "1 kept: 7 tokens (4 train), longest 7",
    ]


def test_text_is_coloured_on_a_terminal(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main([*arguments, "--rows", "1"])
    assert "abc\033[32m de<|endoftext|>\033[0m" in capsys.readouterr().out


def test_page(arguments, tmp_path, capsys):
    row = {"prompt": "<b>", "completion": "&"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    main([*arguments, f"--html={tmp_path / 'page.html'}"])
    assert capsys.readouterr().out.startswith("rows: 0 of 1 rows dropped")
    text = (tmp_path / "page.html").read_text()
    assert '<span class="">&lt;b&gt;</span><span class="t"> &amp;</span>' in text
    assert '<span class="s t">&lt;|endoftext|&gt;</span>' in text
    assert "3 of 6 tokens train" in text
    assert "0 of 1 rows dropped" in text


@pytest.mark.parametrize(
    "change",
    [
        ["--max_seq_length=0"],
        ["--rows=x"],
        ["--js"],
        ["--data=none.jsonl"],
        ["--json", "--html=page.html"],
    ],
)
def test_bad_usage(arguments, change):
    with pytest.raises(UserError):
        main([*arguments, *change])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "mood": "c"}, ", or set --ignore_fields=dataset,"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "or set --train_on=all"),
    ],
)
def test_advice_names_the_flags_of_the_command(arguments, tmp_path, row, words):
    """The field that helps a run, data.ignore_fields, is a flag here; a path stays as it is."""
    file = tmp_path / "data.split" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(row))
    message = message_of(main, [*arguments, f"--data={file}"])
    assert message.startswith(f"{file}: line 1: ")
    assert words in message


def test_bad_usage_exits_2_with_one_line():
    command = [sys.executable, "-m", "olmoe_jax.data", "preview", "--rows=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: the following arguments are required")
    assert len(result.stderr.splitlines()) == 1


def test_importing_the_package_is_cheap():
    code = (
        "import sys, olmoe_jax.data; "
        "sys.exit(any(m in sys.modules for m in ('jax', 'grain', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
