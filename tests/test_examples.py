"""The examples run, and do what their headers say."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, tiny_config, write_hf_checkpoint

from examples import lora_on_my_data, router_gradient


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_fits_one_screen(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_router_gradient_is_that_by_hand():
    by_hand, ours, conventional = router_gradient.main()
    scale = float(jnp.abs(by_hand).max())
    np.testing.assert_allclose(ours, by_hand, atol=1e-5 * scale)
    assert float(jnp.abs(conventional - by_hand).max()) > 0.1 * scale


@pytest.mark.slow
def test_lora_learns_rows_of_ones_own(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setenv("OLMOE_JAX_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    write_hf_checkpoint(base, tiny_config(vocab_size=258))
    shutil.copytree(tokenizer_dir, base, dirs_exist_ok=True)
    rows = [{"prompt": f"after {a}:", "completion": b} for a, b in ("AB", "BC", "CD", "DA")] * 40
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    share = lora_on_my_data.train_and_score(
        str(base), data, tmp_path / "output", rate=2e-2, epochs=10
    )
    assert share > 0.9
    assert (tmp_path / "output/run/adapter/adapter_model.safetensors").exists()
