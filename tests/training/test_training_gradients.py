"""What a step's loss and gradients do not depend on: cuts into micro-batches, packing, padding."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from olmoe_jax.data import Batch
from olmoe_jax.parallel import sharding
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.datasets import load_datasets, training_data
from olmoe_jax.training.program import build_program

pytestmark = pytest.mark.slow


class Gradients(NamedTuple):
    loss: float
    gradients: dict[str, np.ndarray]


class Setup:
    """The compiled functions of a run, and its steps under other data options."""

    def __init__(self, config):
        self.config = config
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.model = open_model(config)
        self.datasets = load_datasets(config, self.model)
        with jax.set_mesh(self.mesh):
            self.program = build_program(config, self.model, self.mesh, 10)

    def first_step(self, *, pack: bool, rows: int, **train):
        config = dataclasses.replace(
            self.config,
            data=dataclasses.replace(self.config.data, pack=pack),
            train=dataclasses.replace(self.config.train, rows_per_device=rows, **train),
        )
        return next(training_data(config, self.datasets, self.mesh).iterator())

    def accumulate(self, batches):
        program = self.program
        with jax.set_mesh(self.mesh):
            on_devices = map(program.to_devices, batches)
            return jax.device_get(program.sums(program.state.parameters, on_devices, 0))

    def gradients(self, batches) -> Gradients:
        total = self.accumulate(batches)
        return Gradients(float(total.loss), total.gradients)


def setup_of(files, tmp_path_factory, **changes):
    config = files.config(
        tmp_path_factory.mktemp("unused"), train__batch_size=8, model__remat="none", **changes
    )
    return Setup(config)


@pytest.fixture(scope="module")
def setup(files, tmp_path_factory):
    return setup_of(files, tmp_path_factory)


def difference(ours: Gradients, expected: Gradients) -> float:
    """The largest relative difference of the loss and, to the largest element, of a tensor."""
    assert ours.gradients.keys() == expected.gradients.keys()
    relative = [abs(ours.loss - expected.loss) / abs(expected.loss)]
    for name, value in expected.gradients.items():
        assert np.abs(value).max() > 0, name
        relative.append(np.abs(ours.gradients[name] - value).max() / np.abs(value).max())
    return max(relative)


@pytest.fixture(scope="module")
def unpacked(setup):
    return setup.gradients(setup.first_step(pack=False, rows=4).batches)


@pytest.mark.parametrize(
    "rows",
    [
        2,
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (8, 1)),
    ],
)
def test_micro_batches_of_ragged_lengths(setup, unpacked, rows):
    step = setup.first_step(pack=False, rows=rows)
    assert len(step.batches) == 8 // rows
    if len(step.batches) > 1:
        assert len({int((batch.segment_ids > 0).sum()) for batch in step.batches}) > 1
    assert difference(setup.gradients(step.batches), unpacked) < 1e-5


def test_accumulating_on_the_device_is_adding(setup, unpacked):
    total = setup.gradients(setup.first_step(pack=False, rows=4).batches)
    assert difference(total, unpacked) < 1e-5


def test_packed_is_unpacked(setup, unpacked):
    step = setup.first_step(pack=True, rows=4)
    assert step.batches[0].segment_ids.max() > 1
    assert difference(setup.gradients(step.batches), unpacked) < 1e-5


def rows_of(batch: Batch, weights: np.ndarray, rows: slice) -> Batch:
    """These rows with these loss weights, and empty rows up to the same number."""
    arrays = []
    for array in batch._replace(loss_weights=weights):
        arrays.append(np.zeros_like(array))
        arrays[-1][: len(array[rows])] = array[rows]
    return Batch(*arrays)


def test_microbatch_normalization_is_the_mean_of_the_means(setup, unpacked):
    """By hand: each micro-batch apart, padded, with the mean over its own targets."""
    step = setup.first_step(pack=False, rows=8)
    (whole,) = step.batches
    trained = (whole.loss_weights > 0).astype(np.float32)
    parts = []
    for start in (0, 3, 6):
        rows = slice(start, start + 3)
        weights = trained / trained[rows].sum()
        parts.append(setup.gradients([rows_of(whole, weights, rows)]))
    expected = jax.tree.map(lambda *x: sum(x) / 3, *parts)
    options = {"loss_normalization": "microbatch", "microbatch_examples": 3}
    for pack in (False, True):
        step = setup.first_step(pack=pack, rows=4, **options)
        ours = setup.gradients(step.batches)
        assert difference(ours, expected) < 1e-5
        assert difference(ours, unpacked) > 1e-3


@pytest.fixture(scope="module")
def setup_with_auxiliary_loss(files, tmp_path_factory):
    return setup_of(files, tmp_path_factory, method__router_aux_loss_coefficient=1.0)


def test_auxiliary_loss_reaches_the_router(setup_with_auxiliary_loss, unpacked):
    with_loss = setup_with_auxiliary_loss
    ours = with_loss.gradients(with_loss.first_step(pack=False, rows=4).batches)
    # The reported loss is the same; the gradients are not.
    assert ours.loss == pytest.approx(unpacked.loss, rel=1e-6)
    router = "layers.moe.router"
    change = np.abs(ours.gradients[router] - unpacked.gradients[router]).max()
    assert change > 0.05 * np.abs(unpacked.gradients[router]).max()


@pytest.mark.parametrize(
    ("pack", "rows"),
    [
        (True, 1),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((True, 4), (False, 2), (False, 8))
        ),
    ],
)
def test_auxiliary_loss_is_of_the_step(setup_with_auxiliary_loss, pack, rows):
    """Packing and micro-batches do not change the balance, since it is that of all tokens."""
    setup = setup_with_auxiliary_loss
    whole = setup.first_step(pack=False, rows=8).batches
    part = setup.first_step(pack=pack, rows=rows).batches
    assert len(whole) == 1
    assert difference(setup.gradients(part), setup.gradients(whole)) < 1e-5


def test_auxiliary_loss_under_dropout(files, tmp_path_factory):
    """The tokens are counted with the dropout under which the step computes."""
    lora = {"method__lora_rank": 4, "method__lora_dropout": 0.5}
    setup = setup_of(files, tmp_path_factory, method__router_aux_loss_coefficient=1.0, **lora)
    program, batch = setup.program, setup.first_step(pack=False, rows=8).batches[0]
    with jax.set_mesh(setup.mesh):
        # The adapters' product is zero at the start, and dropout would change nothing.
        weights = {k: v + 0.1 for k, v in program.state.parameters.items()}, program.frozen
        rest = program.to_devices(batch), np.array([3, 1], np.uint32)
        load = program.expert_load(*weights, *rest)
        sums = program.accumulate(*weights, program.zero_sums(), *rest)
        np.testing.assert_array_equal(load, sums.statistics.load)
        other = program.expert_load(*weights, rest[0], np.zeros(2, np.uint32))
        assert (load != other).any()


@pytest.mark.parametrize("auxiliary", [False, True])
def test_padding_counts_nowhere(request, auxiliary):
    setup = request.getfixturevalue("setup_with_auxiliary_loss" if auxiliary else "setup")
    step = setup.first_step(pack=False, rows=4)
    batch = step.batches[0]
    padding = batch.segment_ids == 0
    noise = np.random.default_rng(0).integers(2, 258, batch.tokens.shape, dtype=np.int32)
    other = batch._replace(
        tokens=np.where(padding, noise, batch.tokens),
        positions=np.where(padding, 7, batch.positions),
    )
    before, after = setup.accumulate([batch]), setup.accumulate([other])
    assert (
        difference(
            Gradients(float(after.loss), after.gradients),
            Gradients(float(before.loss), before.gradients),
        )
        < 1e-6
    )
    np.testing.assert_allclose(before.statistics.load.sum(axis=1), 2 * (~padding).sum())
    for name in ("load", "probability", "entropy"):
        np.testing.assert_allclose(
            getattr(after.statistics, name), getattr(before.statistics, name), rtol=1e-6
        )
