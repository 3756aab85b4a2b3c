"""The doctor's page: what is wrong is on it, with its cure, and the exit code says so."""

import re
import time
import types

import huggingface_hub.constants
import jax
import pytest

from olmoe_jax import accelerator, doctor
from olmoe_jax.ops import grouped_matmul
from olmoe_jax.ops.grouped_matmul import ragged

DETECT = accelerator.detect


@pytest.fixture
def page(monkeypatch, capsys, tmp_path):
    """Runs the command on a machine where nothing is wrong; returns exit code and page."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(accelerator, "detect", lambda: ("cpu", "no accelerator"))
    monkeypatch.setenv("OLMOE_JAX_CACHE", str(tmp_path))

    def run():
        with pytest.raises(SystemExit) as ended:
            doctor.main([])
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "kernels", lambda: iter(()))
    monkeypatch.setattr(doctor, "layer", lambda: iter(()))


@pytest.mark.slow
def test_healthy_machine(page, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_CPU_LAYER", doctor._CPU_LAYER | {"hidden": 16, "tokens": 64})
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "program").write_bytes(bytes(2**20))
    code, text = page()
    assert (code, "WRONG" in text) == (0, False)
    assert f"jax {jax.__version__}" in text
    assert re.search(r"compiled +1 files, 0.00 GiB", text)
    assert re.search(r"grouped_matmul +blocked: error .* \(default\)", text)
    assert re.search(r"attention +chunked: error .* \(default\)", text)
    assert re.search(r"one layer +[\d,]+ tokens/s", text)
    assert text.endswith("nothing is wrong\n")


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["wrong numbers", "no compiler"])
def test_wrong_kernel(page, monkeypatch, failure):
    def rows_by_weights(x, w, group_sizes, contract_last):
        if failure == "no compiler":
            raise NotImplementedError("no ptxas\nhere")
        return ragged.rows_by_weights(x, w, group_sizes, contract_last) + 1

    fake = types.SimpleNamespace(rows_by_weights=rows_by_weights, rows_by_rows=ragged.rows_by_rows)
    monkeypatch.setitem(grouped_matmul.BACKENDS, "fast", fake)
    monkeypatch.setattr(grouped_matmul, "default_backend", lambda platform: "fast")
    monkeypatch.setattr(doctor, "layer", lambda: iter(()))
    code, text = page()
    assert code == 2
    assert re.search(r"WRONG grouped_matmul +fast: (error [1-9]|no ptxas, )", text)
    assert "grouped_matmul: write --config.model.grouped_matmul=blocked\n" in text


def test_what_an_interrupted_pip_left_behind(monkeypatch, tmp_path):
    (tmp_path / "~ax-0.4.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert [name for name, *_ in doctor.versions()] == ["python", "jax"]


def test_driver_that_is_too_old(page, monkeypatch):
    monkeypatch.setattr(accelerator, "detect", DETECT)
    monkeypatch.setattr(accelerator, "_nvidia_driver", lambda system: ("470.1", 7.0))
    code, text = page()
    assert code == 2
    assert "devices: update the NVIDIA driver" in text


def test_jax_that_does_not_use_the_accelerator(page, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerator, "detect", lambda: ("cuda13", "a GPU"))
    code, text = page()
    assert code == 2
    assert "devices: make install ACCELERATOR=cuda13\n" in text
    assert "one layer" not in text


def test_versions_of_jax_that_differ(page, monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "1.2.3" if name == "jax" else "1.2.4"
    )
    code, text = page()
    assert code == 2
    assert "jax: make install\n" in text


@pytest.mark.usefixtures("without_kernels")
def test_silent_hub_holds_nothing_up(page, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(30))
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    code, text = page()
    assert code == 2
    assert re.search(r"WRONG hub +no answer within 0.1 s", text)
    assert "hub: check the network, or export HF_HUB_OFFLINE=1" in text


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("path", ["file", "~nobody12/x"])
def test_cache_that_cannot_be_written(page, monkeypatch, tmp_path, path):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMOE_JAX_CACHE", path)
    code, text = page()
    assert code == 2
    assert "cache: set OLMOE_JAX_CACHE to a directory" in text
