"""Data sets on the hub by name, from a server on this machine and from the caches."""

import json
import os
import subprocess
import sys

import pytest
from data.hub_server import COMMIT, HubServer

from olmoe_jax.data.hub_dataset import load_from_hub
from olmoe_jax.data.reading import read_source
from olmoe_jax.sources import parse

ROW = {"prompt": "a", "completion": "b"}
TRAIN, TEST = [f"train {i}" for i in range(10)], ["test 0", "test 1"]
ROWS = {
    split: "".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in texts)
    for split, texts in (("train", TRAIN), ("test", TEST))
}
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""
REPOSITORIES = {
    "o/plain": {f"{split}.jsonl": rows.encode() for split, rows in ROWS.items()},
    "o/two": {
        "README.md": CARD.encode(),
        "main/train.jsonl": ROWS["train"].encode(),
        "main/test.jsonl": ROWS["test"].encode(),
        "other/train.jsonl": b'{"prompt": "other", "completion": "x"}\n',
    },
    "o/script": {"script.py": b"raise SystemExit('code of the hub ran')\n", "README.md": b"# It\n"},
    "o/empty": {"README.md": b"# Nothing\n"},
}
READ = """
import datasets, json, sys
datasets.config.USE_PARQUET_EXPORT = False  # which another server has
from olmoe_jax.data.reading import read_source
from olmoe_jax.errors import UserError
from olmoe_jax.sources import parse
for text in sys.argv[1:]:
    try:
        print(json.dumps([row["prompt"] for s in parse(text) for _, row in read_source(s)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def read(texts, home, **environment):
    """Returns the prompts of sources, or the error; huggingface_hub reads its settings once."""
    environment = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", READ, *texts],
        env=os.environ | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


EXPECTED = {
    "o/plain": TRAIN,
    "o/plain split=test": TEST,
    "o/plain split=train[:20%]": TRAIN[:2],
    "o/plain split=train[8:]+test": [*TRAIN[8:], *TEST],
    "o/two config=main": TRAIN,
    "o/two config=other": ["other"],
}
REFUSED = {
    "o/plain split=dev": "it has no split dev, but ",
    "o/plain split=train[:20": "train[:20 is no slice of a split; write as train[:10%]",
    "o/plain config=main": "it has no configuration main, but ",
    "o/two": "it has several configurations, main, other; write OWNER/NAME:FILE, or config=NAME (d",
    "o/two config=third": "it has no configuration third, but ",
    "o/script": "it is made by a script, script.py, and code of the hub is never run",
    "o/nothing": "it does not exist or is private; check the id",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each source gives, with the hub, without it, and from the hub's cache alone."""
    home, hub_cache = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cache")
    for name, files in REPOSITORIES.items():
        folder = hub_cache / "hub" / f"datasets--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)
        for path, content in files.items():
            file = folder / "snapshots" / COMMIT / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    texts = [*EXPECTED, *REFUSED]
    with HubServer(REPOSITORIES) as server:
        online = read(texts, home, HF_ENDPOINT=server.url, HF_HUB_OFFLINE=0)
    offline = read(texts, home, HF_HUB_OFFLINE=1)
    cached = read(texts, hub_cache, HF_HUB_OFFLINE=1)
    return {"online": online, "offline": offline, "cached": cached}


@pytest.mark.slow
def test_by_name_configuration_and_split(answers):
    for way in ("online", "offline", "cached"):
        assert answers[way][: len(EXPECTED)] == [*EXPECTED.values()], way


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_refused_in_one_line(answers):
    for (text, words), said in zip(
        REFUSED.items(), answers["online"][len(EXPECTED) :], strict=True
    ):
        assert said.startswith(text.split()[0])
        assert words in said
        assert "\n" not in said
    offline = dict(zip(REFUSED, answers["offline"][len(EXPECTED) :], strict=True))
    assert "HF_HUB_OFFLINE is set, and the cache does not have it" in offline["o/nothing"]
    assert "the cache has several configurations of it, " in offline["o/two"]
    assert "the cache has no configuration third of it, but" in offline["o/two config=third"]


def test_named_files_and_splits_are_asked_for(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*names, **arguments):
        calls.append((*names, arguments))
        return datasets.Dataset.from_list([ROW])

    load_from_hub.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        for source in parse("o/n:test.jsonl, o/n split=dev, o/n config=main", split="test"):
            assert [*read_source(source)] == [(f"{source.path}: row 1", ROW)]
    assert calls == [
        ("o/n", {"data_files": "test.jsonl", "split": "train"}),
        ("o/n", None, {"split": "dev"}),
        ("o/n", "main", {"split": "test"}),
    ]
    load_from_hub.cache_clear()
