"""The proof of a run's kernels: the right ones pass, the others end the run with one line."""

import dataclasses
import types

import pytest
from helpers import message_of
from tiny import tiny_config

from olmoe_jax.model.config import LoraSettings, ModelSettings
from olmoe_jax.ops import grouped_matmul
from olmoe_jax.ops.grouped_matmul import ragged
from olmoe_jax.training.proofs import prove_kernels

CONFIG = tiny_config()
SETTINGS = ModelSettings(grouped_matmul="blocked", attention="chunked")


@pytest.mark.parametrize("lora", [None, pytest.param(LoraSettings(4, 8.0), marks=pytest.mark.slow)])
def test_right_kernels(lora):
    line = prove_kernels(CONFIG, dataclasses.replace(SETTINGS, lora=lora), rows=2, length=32)
    assert line.startswith("kernels proven against plain XLA: largest error grouped_matmul ")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("sum", "model.grouped_matmul=fast: wrong on this device, its error against plain XLA is "),
        ("nan", "model.grouped_matmul=fast: wrong on this device, its error against plain XLA is "),
        ("none", "model.grouped_matmul=fast: does not run here (no compiler); write "),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch, wrong, expected):
    def rows_by_rows(*arguments):
        if wrong == "none":
            raise RuntimeError("no compiler\nand more")
        return ragged.rows_by_rows(*arguments) * (1.1 if wrong == "sum" else float("nan"))

    fake = types.SimpleNamespace(rows_by_weights=ragged.rows_by_weights, rows_by_rows=rows_by_rows)
    monkeypatch.setitem(grouped_matmul.BACKENDS, "fast", fake)
    settings = dataclasses.replace(SETTINGS, grouped_matmul="fast")
    said = message_of(prove_kernels, CONFIG, settings, 2, 32)
    assert said.startswith(expected)
    assert said.endswith("write model.grouped_matmul=blocked")
