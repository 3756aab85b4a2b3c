import dataclasses
import json

import numpy as np
import pytest

from olmoe_jax.data import Batch, TrainingData, evaluation_batches, tokenize_dataset


@pytest.fixture(scope="module")
def dataset(make_dataset):
    return make_dataset(np.random.default_rng(1).integers(1, 100, 23).tolist())


def training(dataset, **changes):
    settings = {
        "batch_size": 5,
        "epochs": 3,
        "max_steps": None,
        "seed": 3,
        "max_seq_length": 128,
        "pack": True,
        "rows_per_batch": 2,
        "loss_normalization": "tokens",
        "microbatch_examples": 2,
        "pad_id": 1,
    }
    return TrainingData(dataset, **{**settings, **changes})


def examples_of(step):
    """The token sequences of a step, in sorted order."""
    found = []
    for batch in step.batches:
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            found += [tuple(tokens[segments == s]) for s in range(1, segments.max() + 1)]
    return sorted(found)


def assert_equal_steps(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert dataclasses.replace(a, batches=[]) == dataclasses.replace(b, batches=[])
        assert len(a.batches) == len(b.batches)
        for x, y in zip(a.batches, b.batches, strict=True):
            for one, other in zip(x, y, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pack", [True, False])
def test_every_example_once_per_epoch_in_a_new_order(dataset, pack):
    data = training(dataset, pack=pack)
    steps = list(data.iterator())
    assert (data.steps_per_epoch, data.total_steps) == (5, 15)
    assert [step.index for step in steps] == list(range(15))
    assert [step.epoch for step in steps] == [0] * 5 + [1] * 5 + [2] * 5
    assert [step.examples for step in steps] == [5, 5, 5, 5, 3] * 3
    everything = sorted(tuple(dataset.example(i).tokens) for i in range(len(dataset)))
    epochs = [steps[start : start + 5] for start in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(e for step in epoch for e in examples_of(step)) == everything
    assert len({tuple(examples_of(epoch[0])) for epoch in epochs}) == 3


def test_a_step_depends_on_the_seed_alone(dataset):
    def contents(**changes):
        return [examples_of(step) for step in training(dataset, **changes).iterator()]

    expected = contents()
    assert contents(pack=False) == expected
    assert contents(rows_per_batch=6, max_seq_length=256) == expected
    assert contents(max_steps=7) == expected[:7]
    assert contents(max_steps=100) == expected
    assert contents(seed=4) != expected


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("normalization", ["tokens", "microbatch"])
def test_counts_and_weights_of_a_step(dataset, pack, normalization):
    for step in training(dataset, pack=pack, loss_normalization=normalization).iterator():
        assert all(batch.tokens.shape[0] == 2 for batch in step.batches)
        segments = np.concatenate([batch.segment_ids.ravel() for batch in step.batches])
        weights = np.concatenate([batch.loss_weights.ravel() for batch in step.batches])
        assert step.tokens == np.count_nonzero(segments)
        assert step.padding == np.count_nonzero(segments == 0)
        assert step.targets == np.count_nonzero(weights)
        np.testing.assert_allclose(weights.sum(dtype=np.float64), 1, rtol=1e-6)


def test_unpacked_rows_are_as_long_as_the_step_needs(make_dataset):
    def row_length(longest, max_seq_length):
        data = training(make_dataset([3, longest]), pack=False, max_seq_length=max_seq_length)
        return next(data.iterator()).batches[0].tokens.shape[1]

    assert [row_length(n, 300) for n in (10, 64, 65, 200, 257)] == [64, 64, 128, 256, 300]
    assert row_length(10, 16) == 16


@pytest.mark.parametrize("stop", [0, 2, 5, 8, 15])
def test_resuming_is_exact(dataset, stop):
    data = training(dataset)
    expected = list(data.iterator())
    iterator = data.iterator()
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = training(dataset).iterator()
    resumed.set_state(state)
    assert_equal_steps(list(resumed), expected[stop:])
    iterator.set_state(state)
    assert_equal_steps(list(iterator), expected[stop:])


@pytest.mark.parametrize("pack", [True, False])
def test_processes_hold_the_rows_of_one(dataset, pack):
    whole = list(training(dataset, pack=pack, rows_per_batch=4).iterator())
    parts = [
        list(
            training(
                dataset, pack=pack, rows_per_batch=4, process_index=i, process_count=2
            ).iterator()
        )
        for i in range(2)
    ]
    merged = []
    for steps in zip(*parts, strict=True):
        batches = [join(shares) for shares in zip(*(s.batches for s in steps), strict=True)]
        merged.append(dataclasses.replace(steps[0], batches=batches))
    assert_equal_steps(merged, whole)


def join(shares):
    return Batch(*map(np.concatenate, zip(*shares, strict=True)))


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_covers_every_target_once(dataset, pack):
    def batches(**changes):
        settings = {"max_seq_length": 128, "pack": pack, "rows_per_batch": 4, "pad_id": 1}
        return list(evaluation_batches(dataset, **settings, **changes))

    whole = batches()
    assert all(batch.tokens.shape == (4, 128) for batch in whole)
    weights = np.concatenate([batch.loss_weights.ravel() for batch in whole])
    assert set(weights) == {0, 1}
    assert weights.sum() == dataset.target_counts.sum()
    shares = [batches(process_index=i, process_count=4) for i in range(4)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        np.testing.assert_array_equal(batch.tokens, join(parts).tokens)


def test_rows_must_divide_over_processes(dataset):
    batches = evaluation_batches(
        dataset, max_seq_length=128, pack=True, rows_per_batch=3, pad_id=1, process_count=2
    )
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        next(batches)


def test_one_example_and_an_example_without_a_target(make_dataset):
    dataset = dataclasses.replace(make_dataset([1]), in_loss=np.ones(1, bool))
    (step, _, _) = training(dataset).iterator()
    assert (step.examples, step.tokens, step.targets) == (1, 1, 0)
    assert step.batches[0].loss_weights.sum() == 0


def test_facts_that_a_run_reports(dataset):
    data = training(dataset, max_steps=12)
    first_epoch = list(data.iterator())[:5]
    padding = sum(step.padding for step in first_epoch)
    share = data.first_epoch_padding_share()
    assert share == pytest.approx(padding / (padding + dataset.lengths.sum()))
    assert (data.steps_per_epoch, data.total_steps) == (5, 12)


@pytest.mark.slow
def test_padding_of_packed_gsm8k_is_below_five_percent(shared, olmoe_tokenizer):
    path = str(shared / "data/gsm/train.jsonl")
    dataset = tokenize_dataset(path, olmoe_tokenizer, 4096)
    for seed in range(3):
        data = training(dataset, batch_size=256, max_seq_length=4096, rows_per_batch=1, seed=seed)
        assert data.first_epoch_padding_share() < 0.05


def test_rows_are_as_short_as_the_number_of_micro_batches_allows(make_dataset):
    dataset = make_dataset(np.random.default_rng(2).integers(20, 200, 400).tolist())

    def packed(rows_per_batch, max_seq_length=2048):
        data = training(
            dataset,
            batch_size=100,
            epochs=1,
            rows_per_batch=rows_per_batch,
            max_seq_length=max_seq_length,
        )
        return data.row_length, list(data.iterator())

    length, steps = packed(8)
    # 100 examples of ~110 tokens: 8 rows of 1408 hold them, where rows of 2048 stay half empty.
    assert length % 128 == 0
    assert length < 2048
    assert [len(step.batches) for step in steps] == [1, 1, 1, 1]
    assert {batch.tokens.shape for step in steps for batch in step.batches} == {(8, length)}
    assert sum(step.padding for step in steps) < 0.15 * sum(step.tokens for step in steps)
    assert packed(8, max_seq_length=200)[0] == 200  # no multiple of 128 holds the longest
