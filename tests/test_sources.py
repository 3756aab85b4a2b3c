"""The text that names sources of rows."""

import math
import time

import pytest

from olmoe_jax.config import Config, options, validate
from olmoe_jax.config.conflicts import conflicts
from olmoe_jax.config.values import check_types
from olmoe_jax.errors import UserError
from olmoe_jax.sources import Source, absolute, expand, parse, short


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.jsonl", [Source("a.jsonl")]),
        ("a.jsonl,b.csv", [Source("a.jsonl"), Source("b.csv")]),
        ("a.jsonl weight=2 , o/n weight=.5", [Source("a.jsonl", 2), Source("o/n", 0.5)]),
        ("shards/*.jsonl.gz weight=1e-1", [Source("shards/*.jsonl.gz", 0.1)]),
        ("my rows.jsonl weight=3", [Source("my rows.jsonl", 3)]),
        ("o/n config=main split=train[:10%]", [Source("o/n", 1, "main", "train[:10%]")]),
        ("o/n:f.jsonl weight=2", [Source("o/n:f.jsonl", 2)]),
        ("a.csv name=a, o/n name=b-2", [Source("a.csv", name="a"), Source("o/n", name="b-2")]),
    ],
)
def test_parse(text, sources):
    assert parse(text) == (*sources,)
    assert parse(", ".join(map(str, sources))) == (*sources,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jsonl weight=0", 'weight is "0"; it must be greater than 0'),
        ("a.jsonl weight=-1", "greater than 0"),
        ("a.jsonl weight=nan", "must be a finite number"),
        ("a.jsonl weight=inf", "must be a finite number"),
        ("a.jsonl weight=1e9", "less than or equal to 1000"),
        ("a.jsonl weight=two", "must be a valid number"),
        ("a.jsonl weight= 2", "weight stands amid a path, or has no value; write PATH"),
        ("a.jsonl weight=2 b.jsonl", "weight stands amid a path"),
        ("a.jsonl weight=", "weight= does not fit; write PATH"),
        ("a.jsonl name=a/b", 'name is "a/b"'),
        ("a.jsonl name= a", "name stands amid a path"),
        ("a.jsonl weight=1 weight=2", "weight=2 does not fit"),
        ("a.jsonl wieght=2", "wieght=2 does not fit; write PATH"),
        ("a.jsonl split=test", "split is only read of a data set OWNER/NAME"),
        ("o/n:f.jsonl config=main", "config is only read of a data set OWNER/NAME"),
        ("a.jsonl,,b.jsonl", "there is no path; write PATH"),
        ("a.jsonl,", "there is no path"),
        ("a\0.jsonl", "has a character that no path can have"),
    ],
)
def test_refused(text, words):
    with pytest.raises(UserError) as error:
        parse(text)
    assert words in str(error.value)


def test_defaults_of_the_hub(tmp_path):
    local, named, file = parse("a.jsonl, o/n, o/n:f.jsonl", "main", "train[:9]")
    assert (local, file) == (Source("a.jsonl"), Source("o/n:f.jsonl"))
    assert named == Source("o/n", 1, "main", "train[:9]")


def test_places(tmp_path, monkeypatch):
    """What exists under the whole text is one source; ~ and relative paths are the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a, b.jsonl weight=2").write_text("")
    assert parse("a, b.jsonl weight=2") == (Source("a, b.jsonl weight=2"),)
    (tmp_path / "c.jsonl").write_text("")
    assert expand("~/x.jsonl weight=2, c.jsonl") == "/home/me/x.jsonl weight=2, c.jsonl"
    assert absolute("c.jsonl weight=2, o/n") == f"{tmp_path}/c.jsonl weight=2, o/n"
    assert short(f"{tmp_path}/c.jsonl weight=2, o/n split=x") == "c.jsonl weight=2, o/n split=x"


def test_a_config_file_may_have_a_list():
    data = options.DataOptions(train_path=[Source("a.jsonl", 0.5), "b.jsonl weight=2"])
    train = options.TrainOptions(output_dir="runs/x")
    config = validate(Config(data=data, train=train))
    assert config.data.train_path == "a.jsonl weight=0.5, b.jsonl weight=2"
    with pytest.raises(UserError, match=r"data\.train_path=.*weight is \"nan\""):
        check_types(Config(data=options.DataOptions(train_path=[Source("a.jsonl", math.nan)])))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train_path": "a.jsonl", "split": "test"}, "data.split=test: only read of a data set"),
        ({"train_path": "o/n split=x", "split": "y"}, "data.split=y: only read"),
        ({"train_path": "a.jsonl", "hub_config": "main"}, "data.hub_config=main: only read of"),
        ({"train_path": "a.jsonl", "eval_path": "b.jsonl weight=2"}, "have a weight"),
        ({"train_path": "a.jsonl name=a"}, "only sources of data.eval_path have a name"),
    ],
)
def test_fields_that_nothing_reads(fields, words):
    with pytest.raises(UserError) as error:
        raise UserError(*conflicts(check_types(Config(data=options.DataOptions(**fields)))))
    assert words in str(error.value)


def test_a_long_text_is_read_in_linear_time():
    start = time.process_time()
    parse("a" + " " * 4000 + "b")
    assert time.process_time() - start < 0.3
