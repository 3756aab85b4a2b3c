"""Model cards: the hub's own parser reads them, and they say what trained and how."""

import json
from typing import get_type_hints

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import short_run, write_base

import olmoe_jax
from convert import merge_lora, to_hf
from olmoe_jax.checkpoints import card
from olmoe_jax.checkpoints.card import add_results, write_card
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.config import Config, to_dict

BASE_CARD = """---
license: apache-2.0
language: en
base_model: allenai/OLMoE-1B-7B-0125
---
# A base
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A base with a card and a license."""
    path = write_base(tmp_path_factory.mktemp("base") / "base")
    (path / "README.md").write_text(BASE_CARD)
    (path / "LICENSE").write_text("the license")
    return path


@pytest.fixture(scope="module")
def lora(run_files, described, tmp_path_factory):
    """A finished LoRA run whose router trained."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    options = {"method__lora_rank": 4, "method__name": "densemixer", "train__max_steps": 1}
    return olmoe_jax.train(short_run(run_files, described, output, **options)).output_dir


def metadata(path) -> dict:
    card = ModelCard.load(path / "README.md")
    assert yaml.safe_load(card.content.split("---")[1]) == card.data.to_dict()
    return card.data.to_dict()


def test_a_card_shows_fields_that_a_configuration_has():
    sections = get_type_hints(Config)
    for section, names in card._SHOWN.items():
        assert set(names) <= set(get_type_hints(sections[section]))


@pytest.mark.slow
def test_the_card_of_an_adapter_and_of_its_merge(lora, described, tmp_path):
    found = metadata(lora / "adapter")
    assert found["base_model"] == "allenai/OLMoE-1B-7B-0125"
    assert (found["license"], found["library_name"]) == ("apache-2.0", "peft")
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["olmoe_jax", "moe", "densemixer", "lora"]
    assert (lora / "adapter" / "LICENSE").read_text() == "the license"
    text = (lora / "adapter" / "README.md").read_text()
    assert "densemixer` with LoRA of rank 4: step 1." in text
    assert "PeftModel" in text
    assert "router.safetensors" in text
    loss = json.loads((lora / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert f"| training loss at the end | {loss} |" in text
    assert "| fingerprint of the data | " in text
    assert str(described) not in text
    assert "| /" not in text

    flags = ["--model", str(described), "--adapter", str(lora / "adapter")]
    merge_lora.main([*flags, "--output", str(tmp_path / "merged")])
    to_hf.main(["--checkpoint", str(lora), "--output", str(tmp_path / "exported")])
    # The card, and what the base lacks: the tokenizer, and the ids that end a turn.
    merged, exported = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("merged", "exported")
    )
    assert merged == exported
    assert "tokenizer.json" in merged
    assert metadata(tmp_path / "merged")["library_name"] == "transformers"
    assert "PeftModel" not in merged


@pytest.mark.slow
def test_scores_become_the_hubs_model_index(lora, tmp_path):
    to_hf.main(["--checkpoint", str(lora), "--output", str(tmp_path / "model")])
    before = (tmp_path / "model" / "README.md").read_text()
    assert add_results(tmp_path / "model", {"gsm": {"exact_match": 12.345}})
    assert add_results(tmp_path / "model", {"law": {"judge": 50.0, "rouge": float("nan")}})
    assert add_results(tmp_path / "model", {"gsm": {"exact_match": 13.0}})
    results = ModelCard.load(tmp_path / "model" / "README.md").data.eval_results
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert scores == {("gsm", "exact_match"): 13.0, ("law", "judge"): 50.0}
    after = (tmp_path / "model" / "README.md").read_text()
    assert before.partition("\n---\n")[2] == after.partition("\n---\n")[2]


@pytest.mark.parametrize("text", ["", "no metadata", "---\nlicense: [\n---\n", "---\n- 1\n---\n"])
def test_a_base_with_another_card(text, tmp_path, described, caplog):
    copy = tmp_path / "base"
    copy.mkdir()
    for file in described.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text(text)
    to_hf.main(["--checkpoint", str(copy), "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "README.md").read_text() == text
    assert not add_results(tmp_path / "model", {"gsm": {"exact_match": 1.0}})
    assert not caplog.records


@pytest.fixture
def card_of(run_files, tmp_path):
    """Returns a function that writes the card of a run, with this card of its base; its text."""

    def write(base="", metrics="", train_path="a/b") -> str:
        run = object.__new__(RunCheckpoint)
        run.path, run.files, run.step, run.base = tmp_path, tmp_path / "model", 1, "/a/base"
        run.checkpoint = tmp_path / "checkpoints" / "1"
        run.run_config = to_dict(run_files.config(tmp_path / "run"))
        run.run_config["data"]["train_path"] = train_path
        run.files.mkdir()
        (run.files / "README.md").write_text(base)
        (tmp_path / "metrics.jsonl").write_text(metrics)
        (tmp_path / "out").mkdir()
        write_card(tmp_path / "out", run)
        ModelCard.load(tmp_path / "out" / "README.md")
        return (tmp_path / "out" / "README.md").read_text()

    return write


@pytest.mark.parametrize(
    "line",
    [
        *("tags: 5", "tags: [[olmoe_jax]]", "eval_results: 3", "1: 2", "language: {no: yes}"),
        *("base_model: [1]", 'base_model: "\\ud800/x"', "x: !!int _", "x: !!timestamp x"),
        *("x: &a [*a]", f"x: {'[' * 5000}", f"x: {'9' * 5000}", "model-index: [1]", "? [a]\n: b"),
    ],
)
def test_no_card_of_a_base_stops_an_export(card_of, line):
    assert "A base of one’s own, fine-tuned by" in card_of(f"---\n{line}\n---\n")


def test_what_a_base_says_goes_on(card_of):
    text = card_of("---\nlicense: mit\nlanguage: [en, no]\nbase_model: [a/b, c/d]\n---\n")
    assert "license: mit" in text
    assert "language" not in text  # YAML reads the second as false
    assert "- c/d" in text
    assert "A base of one’s own" in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/data/x y=1.jsonl", "x y=1.jsonl"),
        ("/data/a, b/train.jsonl", "a, b/train.jsonl"),
        ("/data/a.jsonl weight=2 =", "a.jsonl weight=2 ="),
    ],
)
def test_data_that_lie_elsewhere(card_of, path, shown):
    """On another machine, a path with a comma or a space is that of no file."""
    text = card_of(train_path=path)
    assert f"| data.train_path | {shown} |" in text
    assert "datasets" not in text


def test_data_sets_on_the_hub(card_of):
    text = card_of(train_path="a/b:x.jsonl, c/d weight=2 split=train, a/b")
    assert "datasets:\n- a/b\n- c/d\n" in text


def test_metrics_of_a_card(card_of):
    lines = ['{"step": 1, "loss": 2.5}', '{"step": 1, "eval_loss": null}', '{"step": 2, "loss": 1}']
    text = card_of(metrics="\n".join(lines) + '\n{"st')
    assert "| training loss at the end | 2.5 |\n" in text
    assert "evaluation loss" not in text


def test_damaged_metrics(card_of, capsys):
    """The weights do not depend on them."""
    assert "at the end" not in card_of(metrics='{"loss": 1}\n')
    said = capsys.readouterr().out
    assert said.startswith("note: the model card has no losses: ")
    assert said.endswith("metrics.jsonl: line 1: field step is missing\n")
