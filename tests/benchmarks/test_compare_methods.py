"""The comparison's inputs, judging, cosines and report, on tiny and made-up inputs."""

import json

import numpy as np
import pytest
from tiny import make_model, tiny_config

from benchmarks import compare_methods, router_cosine
from benchmarks.comparison_report import cosine_table, method_table, write_report
from configs.table import EXPERIMENTS
from olmoe_jax.errors import UserError
from olmoe_jax.parallel.batch import DeviceBatch


def made_up_cells(seeds: int) -> dict:
    """Seed s: eval loss 1 + s, exact match s / 4; densemixer's steps take twice as long."""
    cells = {("base", 0): {"eval_loss": 9.0, "exact_match": 0.0, "cosines": {"2": 0.5, "8": 1.0}}}
    for seed in range(seeds):
        for method in EXPERIMENTS:
            seconds = 2.0 if method == "densemixer" else 1.0
            cells[method, seed] = {
                "eval_loss": 1.0 + seed,
                "exact_match": seed / 4,
                "trained_parameters": 2_000_000,
                "seconds": [99.0, *[seconds] * 20],
                "peak_memory": (3 - seed) * 2**30,
            }
            if "mixer" in method or "conventional" in method:
                cells[method, seed]["cosines"] = {"2": 0.5 + 0.25 * seed, "8": 1.0}
    return cells


def test_table_shows_mean_and_spread():
    lines = method_table(made_up_cells(2)).splitlines()
    row = next(line for line in lines if "`densemixer`" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == [
        "`densemixer`",
        "1.500 (1.000–2.000)",
        "12.5% (0.0–25.0)",
        "1 (full)",
        "2.00M",
        "2.00 s (2.00x)",
        "2.00 GiB",
    ]
    conventional = next(line for line in lines if "`conventional`" in line)
    assert "0.625 (0.500–0.750)" in conventional
    frozen = next(line for line in lines if "`frozen`" in line)
    assert frozen.split("|")[4].strip() == "–"


def test_report_of_an_unfinished_comparison(tmp_path):
    cells = {key: cell for key, cell in made_up_cells(1).items() if key[0] in ("base", "frozen")}
    write_report(cells, tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size < 100_000
    assert "`frozen`" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert cosine_table(cells).splitlines()[-1] == "| the base | 0.500 | 1.000 |"


def test_nothing_to_report(tmp_path):
    arguments = ["--text", "book.txt", "--output", str(tmp_path), "--report"]
    with pytest.raises(UserError, match="no cell to report"):
        compare_methods.main(arguments)


@pytest.mark.exhaustive
def test_cosines_grow_with_the_experts_that_get_their_gradient():
    config = tiny_config(num_experts=16)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
    batch = DeviceBatch(tokens, tokens, np.ones_like(tokens), positions, weights)
    cosines = router_cosine.router_cosines(make_model(config), batch)
    assert list(cosines) == ["2", "4", "8", "16"]
    assert 0 < cosines["2"] < cosines["4"] < cosines["8"] < 0.9999
    assert cosines["16"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ('{"a": "1", "b": 2}。\n', '{"b": 2, "a": "1"}。\n\n', True),
        ('{"a": "1"}', '{"a": "2"}。', False),
        ("2 + 3 = 5 eggs.\n#### 5", "#### 5\n", True),
        ("2 + 3 = 6 eggs.\n#### 6", "2 + 3 = 5 eggs.\n#### 5", False),
        (" no JSON{ ", "no JSON{", True),
    ],
)
def test_answers_that_say_the_same(answer, expected, same):
    values = compare_methods.answer_value(answer), compare_methods.answer_value(expected)
    assert (values[0] == values[1]) == same


def test_inputs_hold_out_a_tenth_and_hide_its_questions(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times. " * 100, encoding="utf-8")
    task = tmp_path / "task.jsonl"
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}"} for n in range(100, 140)]
    compare_methods.write_rows(task, rows)
    inputs = tmp_path / "inputs"
    compare_methods.write_inputs(inputs, [book], task, examples=3)
    parts = {
        name: [json.loads(line) for line in (inputs / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval", "text")
    }
    assert (len(parts["train"]), len(parts["eval"])) == (36, 3)
    assert not any(row in parts["train"] for row in parts["eval"])
    text = "".join(row["completion"] for row in parts["text"])
    assert all(row["prompt"] in text for row in parts["train"])
    assert not any(row["prompt"] in text for row in parts["eval"])
    assert "Answer" not in text
