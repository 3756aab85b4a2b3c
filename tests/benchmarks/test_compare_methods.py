"""The comparison's report, its cosines and its judging of answers, on made-up and tiny inputs."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

from benchmarks import compare_methods
from benchmarks.comparison_report import method_table, write_report
from configs.table import METHODS
from olmoe_jax.model.olmoe import Olmoe
from olmoe_jax.training.step import DeviceBatch


def made_up_cell(seed: int, seconds: float) -> dict:
    return {
        "eval_loss": 1.0 + seed,
        "exact_match": 0.25 * seed,
        "cosines": {"2": 0.5, "4": 0.75, "8": 1.0},
        "trained_parameters": 2_000_000,
        "seconds": [10 * seconds, *[seconds] * 20],
        "peak_memory": 2**30 * (2 - seed),
    }


def test_report_has_every_method_with_its_spread(tmp_path):
    cells = {
        (method, seed): made_up_cell(seed, 2.0 if method == "densemixer" else 1.0)
        for method in METHODS
        for seed in (0, 1)
    }
    cells["base", 0] = made_up_cell(0, 1.0)
    write_report(cells, tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    lines = method_table(cells).splitlines()
    assert len(lines) == 2 + 1 + len(METHODS)
    (line,) = (line for line in lines if line.startswith("| `densemixer` "))
    columns = [column.strip() for column in line.strip("|").split("|")]
    # Mean (lowest–highest) of both seeds; the slow first step does not count.
    assert columns[2] == "1.500 (1.000–2.000)"
    assert columns[3] == "12.5% (0.0–25.0)"
    assert columns[4:] == ["1 (exact)", "2.00M", "2.00 s (2.00x)", "1.00 GiB"]
    (line,) = (line for line in lines if line.startswith("| `conventional` "))
    assert "| 0.500 (0.500–0.500) |" in line
    assert "| the base | 0.500 | 0.750 | 1.000 |" in (tmp_path / "cosines.md").read_text()


def test_more_experts_bring_the_router_gradient_closer():
    config = tiny_config()
    model = Olmoe(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 2, config.vocab_size)
    ones = np.ones((2, 24))
    batch = DeviceBatch(
        tokens,
        np.roll(tokens, -1, 1),
        ones.astype(np.int32),
        np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24)),
        ones.astype(np.float32),
    )
    cosines = compare_methods.router_cosines(model, batch)
    assert list(cosines)[-1] == str(config.num_experts)
    assert cosines[str(config.num_experts)] == pytest.approx(1.0)
    assert cosines[str(config.num_experts_per_token)] < 0.999


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ('{"intent": "x", "slots": {}}', True),
        (' {"slots": {},  "intent": "x"}。', True),
        ('{"intent": "y", "slots": {}}', False),
        ("none", False),
    ],
)
def test_answers_are_compared_as_json(answer, same):
    right = '{"intent": "x", "slots": {}}'
    assert (compare_methods.value(answer) == compare_methods.value(right)) == same
