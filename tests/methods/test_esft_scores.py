"""Scores are those of transformers' router logits on the same rows, whatever the layout."""

import json

import jax
import numpy as np
import pytest
from helpers import message_of, relative_error
from tiny import BYTES, LENGTHS, ROWS, make_examples, tiny_config, write_base

from olmoe_jax import data
from olmoe_jax import esft as command
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.loading import load_parameters
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import graph_of
from olmoe_jax.parallel.sharding import make_mesh

CONFIG = tiny_config(**BYTES)
PAD = 1


def rows_of(dataset, rows=None):
    rows = dataset.members if rows is None else dataset.members[rows]
    return [dataset.tokens[dataset.offsets[row] : dataset.offsets[row + 1]] for row in rows]


def torch_scores(base, rows):
    """One row at a time, so without any padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = []
    for row in rows:
        tokens = torch.from_numpy(np.asarray(row, np.int64))[None]
        with torch.no_grad():
            out = model(tokens, output_router_logits=True)
        parts.append(np.stack([layer.numpy() for layer in out.router_logits]))
    logits = np.concatenate(parts, axis=1).astype(np.float64)
    assert logits.shape == (2, sum(map(len, rows)), 8)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    return {"gate": probabilities.mean(1), "token": (probabilities >= 0.01).mean(1) / 2}


@pytest.fixture(scope="module")
def compute(base):
    source = HFCheckpoint(base)
    mesh = make_mesh(devices=jax.devices()[:1])
    parameters = load_parameters(source, mesh)

    def compute(dataset, **changes):
        options = {"max_tokens": 1000, "seed": 0}
        layout = dict(ROWS)
        for name, value in changes.items():
            (layout if name in layout else options)[name] = value
        graph = graph_of(CONFIG, ModelSettings())
        return expert_scores(graph, parameters, CONFIG, mesh, dataset, **options, layout=layout)

    return compute


@pytest.fixture(scope="module")
def expected(base):
    return torch_scores(base, rows_of(make_examples()))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pack": False, "rows_per_batch": 3},
        {"max_seq_length": 64, "rows_per_batch": 1},
    ],
)
def test_transformers_router_logits(compute, expected, layout):
    scores, tokens = compute(make_examples(), **layout)
    assert tokens == sum(LENGTHS)
    for function, values in expected.items():
        assert relative_error(scores[function], values) <= 1e-5, function
    # A token's probabilities sum to 1: padding would add to this.
    np.testing.assert_allclose(scores["gate"].sum(axis=1), 1, rtol=1e-5)
    # The threshold tells the functions apart.
    assert relative_error(scores["token"] * 2, scores["gate"]) > 0.1


def test_max_tokens(compute, base):
    """Examples in a seeded order until they hold as many: not more, and not always the same."""
    dataset = make_examples()
    seen = set()
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(len(LENGTHS))
        ends = np.cumsum(np.array(LENGTHS)[order])
        for limit in (int(ends[1]), int(ends[1]) + 1):
            count = 2 + (limit > ends[1])
            scores, tokens = compute(dataset, max_tokens=limit, seed=seed)
            assert tokens == ends[count - 1]
            wanted = torch_scores(base, rows_of(dataset, order[:count]))
            assert relative_error(scores["gate"], wanted["gate"]) <= 1e-5
            seen.add(scores["gate"].tobytes())
    assert len(seen) == 4
    # One token is enough to begin with; a limit above all takes all.
    assert compute(dataset, max_tokens=1)[1] == LENGTHS[np.random.default_rng(0).permutation(8)[0]]
    assert compute(dataset, max_tokens=sum(LENGTHS))[1] == sum(LENGTHS)


def test_command(base, run_files, tokenizer, tmp_path, capsys):
    output = tmp_path / "scores"
    command.main(
        [
            "score",
            *("--model", str(base), "--data", str(run_files.train)),
            *("--tokenizer", str(run_files.tokenizer), "--output", str(output)),
            *("--max_tokens", "60", "--max_seq_length", "64", "--seed", "3"),
        ]
    )
    dataset = data.tokenize_dataset(str(run_files.train), tokenizer, 64)
    lengths = dataset.lengths
    order = np.random.default_rng(3).permutation(len(dataset))
    count = int(np.argmax(np.cumsum(lengths[order]) >= 60)) + 1
    expected = torch_scores(base, rows_of(dataset, order[:count]))
    written = json.loads((output / "scores.json").read_text())
    for function, values in expected.items():
        table = written[f"{function}_scores"]
        assert list(table) == ["1", "2"]
        ours = [[row[str(expert)] for expert in range(8)] for row in table.values()]
        assert relative_error(ours, values) <= 1e-5
    assert (output / "scores.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(file.name for file in output.iterdir()) == ["scores.json", "scores.png"]
    said = capsys.readouterr().out
    best = np.sort(expected["gate"], axis=1)[:, -2:].sum(axis=1).mean()
    assert f"scored {int(lengths[order[:count]].sum())} tokens; the 2 best of 8 experts" in said
    assert f"hold {best:.0%} of a layer's gate score" in said


def test_a_tokenizer_of_another_model(run_files, tmp_path):
    """Its tokens would be zeros to the model, whose scores would be wrong."""
    small, output = write_base(tmp_path / "small", vocab_size=20), tmp_path / "out"
    arguments = ["--model", str(small), "--data", str(run_files.train), "--output", str(output)]
    message = message_of(command.main, ["score", *arguments, f"--tokenizer={run_files.tokenizer}"])
    assert message.startswith(f"the tokenizer of {run_files.tokenizer} gives token ")
    assert message.endswith("the model's vocabulary has 20; write the model's as --tokenizer")
    assert not output.exists()


def test_advice_names_the_flags_of_the_command(run_files, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "mood": "c"}')
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    arguments += ["--model", str(write_base(tmp_path / "small"))]
    message = message_of(command.main, ["score", *arguments, f"--tokenizer={run_files.tokenizer}"])
    assert "remove it, or set --ignore_fields=dataset," in message
