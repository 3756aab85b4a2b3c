"""Where parameters lie; that no mesh changes a number is eight_devices/test_mesh_decoder.py."""

import math
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from olmoe_jax.checkpoints.loading import parameter_specs
from olmoe_jax.errors import UserError
from olmoe_jax.parallel.sharding import (
    RULES,
    check_experts,
    make_mesh,
    mesh_axes,
    partition_spec,
    vocabulary_axes,
)

EIGHT = ["a device"] * 8


def mesh_of(data=1, fsdp=4, expert=1):
    return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "expert": expert})


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


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Experts over both axes, a device's experts being neighbours when fsdp is gathered.
        ((2, 8, 32, 16), P(None, ("expert", "fsdp"), None, None)),
        # Over both they do not divide: over expert, and the next dimension over fsdp.
        ((2, 6, 32, 16), P(None, "expert", "fsdp", None)),
        ((2, 6, 30, 15), P(None, "expert", None, None)),
        ((2, 5, 32, 16), P(None, None, ("expert", "fsdp"), None)),
    ],
)
def test_partition_spec_with_an_expert_axis(shape, expected):
    axes = ("layer", "expert", "embed", "mlp")
    assert partition_spec(shape, axes, mesh_of(expert=2)) == expected


def test_vocabulary_axes():
    assert vocabulary_axes((64, 32), mesh_of(expert=2)) == ("expert", "fsdp")
    assert vocabulary_axes((62, 32), mesh_of(expert=2)) == ("expert",)
    assert vocabulary_axes((61, 32), mesh_of(expert=2)) == ()
    assert vocabulary_axes((64, 32), mesh_of()) == ("fsdp",)
    assert vocabulary_axes((64, 32), mesh_of(data=8, fsdp=1)) == ()


@pytest.mark.parametrize("fsdp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("experts", [4, 6, 8])
@pytest.mark.parametrize("expert", [1, 2])
def test_every_parameter_has_a_valid_spec(fsdp, experts, expert):
    mesh = mesh_of(2, fsdp, expert)
    for name, spec in parameter_specs(tiny_config(num_experts=experts)).items():
        assert set(spec.axes) <= set(RULES), name
        placed = [mesh_axes(entry) for entry in partition_spec(spec.shape, spec.axes, mesh)]
        used = [axis for axes in placed for axis in axes]
        assert len(used) == len(set(used)), name
        for size, axes in zip(spec.shape, placed, strict=True):
            assert size % math.prod(mesh.shape[axis] for axis in axes) == 0, name


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1), (1, 8, 1)),
        ((2, -1), (2, 4, 1)),
        ((-1, 2), (4, 2, 1)),
        ((2, 4), (2, 4, 1)),
        ((-1, -1), (8, 1, 1)),
        ((1, -1, 4), (1, 2, 4)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_make_mesh(sizes, expected):
    mesh = make_mesh(*sizes, devices=EIGHT)
    assert tuple(mesh.shape.items()) == tuple(
        zip(("data", "fsdp", "expert"), expected, strict=True)
    )


@pytest.mark.parametrize(
    "sizes", [(3, -1), (-1, 5), (2, 2), (1, 16), (16, 1), (1, -1, 3), (2, 4, 2)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError) as caught:
        make_mesh(*sizes, devices=EIGHT)
    message = str(caught.value)
    assert f"mesh.data={sizes[0]} mesh.fsdp={sizes[1]}" in message
    assert (f"mesh.expert={sizes[-1]}" in message) == (len(sizes) == 3)
    assert "8" in message
    assert "\n" not in message


def test_experts_that_the_axis_does_not_divide_are_refused():
    check_experts(4, 64)
    with pytest.raises(UserError, match=r"mesh\.expert=3: .* 64 experts; use a divisor of 64$"):
        check_experts(3, 64)


def test_make_mesh_takes_all_devices():
    assert make_mesh().size == jax.device_count()
