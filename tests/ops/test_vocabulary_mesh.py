"""Cross-entropy and embedding lookup with the vocabulary split over a mesh."""

import math
from pathlib import Path

import pytest
from helpers import on_eight_devices


@pytest.fixture(scope="module")
def results():
    return on_eight_devices(
        Path(__file__).with_name("vocabulary_worker.py"),
        environment={"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=2,expert=4"])
@pytest.mark.parametrize("vocab", [48, 50])
def test_loss_and_gradients(results, vocab, mesh):
    """Against float64 by hand; 50 rows divide by fsdp=2 alone, 27 positions by no chunk."""
    errors = results[f"{vocab} {mesh}"]
    assert set(errors) == {"loss", "hidden", "head", "embed", "weights"}
    assert max(errors.values()) < 1e-6, errors


def test_bfloat16(results):
    assert max(results["bfloat16"].values()) < 2e-2, results["bfloat16"]
    assert max(results["bfloat16"].values()) > 1e-5


def test_no_whole_table_and_no_rows_logits(results):
    """Of V = 16,392 = 8 x 2,049 a device only ever sees its own 2,049 rows."""
    vocab, width, positions, chunk = 16392, 16, 600, 60
    shapes = results["shapes"]
    assert not [shape for shape in shapes if vocab in shape]
    sizes = {math.prod(shape) for shape in shapes}
    assert vocab * width not in sizes
    assert max(sizes) == 8 * chunk * vocab // 8 < positions * vocab
