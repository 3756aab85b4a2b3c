"""Where parameters lie, and that no mesh changes a number."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from helpers import on_eight_devices, tiny_config
from jax.sharding import PartitionSpec as P

from olmoe_jax.errors import UserError
from olmoe_jax.model.loading import parameter_specs
from olmoe_jax.sharding import RULES, make_mesh, partition_spec

EIGHT = ["a device"] * 8


def mesh_of(data=1, fsdp=4):
    return SimpleNamespace(shape={"data": data, "fsdp": fsdp})


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        # Experts over fsdp; the axis is used once.
        ((2, 8, 32, 16), ("layer", "expert", "embed", "mlp"), P(None, "fsdp", None, None)),
        # Indivisible: the next dimension that divides.
        ((2, 6, 32, 16), ("layer", "expert", "embed", "mlp"), P(None, None, "fsdp", None)),
        ((2, 6, 30, 16), ("layer", "expert", "embed", "mlp"), P(None, None, None, "fsdp")),
        # Nothing divides: replicated.
        ((2, 6, 30, 15), ("layer", "expert", "embed", "mlp"), P(None, None, None, None)),
        ((61, 32), ("vocab", "embed"), P(None, "fsdp")),
        ((64, 32), ("vocab", "embed"), P("fsdp", None)),
        # Layers are scanned over and norms are small: whole.
        ((4, 32), ("layer", "norm"), P(None, None)),
        ((4, 32, 8), ("layer", "embed", "router"), P(None, "fsdp", None)),
    ],
)
def test_partition_spec(shape, axes, expected):
    assert partition_spec(shape, axes, mesh_of()) == expected


@pytest.mark.parametrize("fsdp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("experts", [4, 6, 8])
def test_every_parameter_has_a_valid_spec(fsdp, experts):
    for name, spec in parameter_specs(tiny_config(num_experts=experts)).items():
        assert set(spec.axes) <= set(RULES), name
        placed = partition_spec(spec.shape, spec.axes, mesh_of(2, fsdp))
        used = [axis for axis in placed if axis is not None]
        assert len(used) == len(set(used)), name
        for size, axis in zip(spec.shape, placed, strict=True):
            assert axis is None or size % fsdp == 0, name


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, -1), (1, 8)), ((2, -1), (2, 4)), ((-1, 2), (4, 2)), ((2, 4), (2, 4)), ((-1, -1), (8, 1))],
)
def test_make_mesh(sizes, expected):
    mesh = make_mesh(*sizes, devices=EIGHT)
    assert dict(mesh.shape) == {"data": expected[0], "fsdp": expected[1]}


@pytest.mark.parametrize("sizes", [(3, -1), (-1, 5), (2, 2), (1, 16), (16, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError) as caught:
        make_mesh(*sizes, devices=EIGHT)
    message = str(caught.value)
    assert f"mesh.data={sizes[0]} mesh.fsdp={sizes[1]}" in message
    assert "8" in message
    assert "\n" not in message


def test_make_mesh_takes_all_devices():
    assert make_mesh().size == jax.device_count()


@pytest.fixture(scope="module")
def errors():
    return on_eight_devices(Path(__file__).with_name("sharding_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "tied,fsdp=8", "6 experts,fsdp=4"])
def test_meshes_change_no_number(errors, mesh):
    """Loss, router load and every gradient of a DenseMixer step with padding and remat."""
    assert set(errors[mesh]) > {"loss", "load", "layers.moe.router", "layers.moe.experts.down"}
    assert errors[mesh].pop("load") == 0
    # A vocabulary of 61 does not divide and is gathered; the others' never is.
    assert (errors[mesh].pop("whole") > 0) == (mesh == "6 experts,fsdp=4")
    worst = max(errors[mesh], key=errors[mesh].get)
    assert errors[mesh][worst] < 1e-5, worst
