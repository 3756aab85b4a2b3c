import numpy as np
import pytest

from olmoe_jax.data.packing import Batch, fill_rows, loss_weights_per_example, pack
from olmoe_jax.parallel.batch import DeviceBatch


@pytest.mark.parametrize("seed", range(30))
def test_packing_invariants(seed):
    random = np.random.default_rng(seed)
    row_length = int(random.integers(1, 200))
    lengths = random.integers(1, row_length + 1, random.integers(0, 80)).tolist()
    rows = pack(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_length for row in rows)
    bound = -(-sum(lengths) // row_length)
    assert bound <= len(rows) <= max(11 / 9 * bound + 1, 2 * bound)
    assert rows == pack(np.array(lengths), row_length)


@pytest.mark.parametrize(
    ("lengths", "row_length", "rows"),
    [
        ([6, 5, 5, 4, 3, 3, 2, 2], 10, [[0, 3], [1, 2], [4, 5, 6, 7]]),
        ([2, 6, 5, 7], 10, [[3, 0], [1], [2]]),  # 2 goes where it leaves 1, not 2 or 3
        ([10, 8, 4, 3, 3, 3], 16, [[0, 2], [1, 3, 4], [5]]),  # two rows would do: 10+3+3, 8+4+3
        ([], 10, []),
    ],
)
def test_packing_is_best_fit_decreasing(lengths, row_length, rows):
    assert pack(lengths, row_length) == rows


@pytest.mark.parametrize("seed", range(10))
def test_loss_weights_against_the_definition(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, random.integers(1, 30))
    counts[0] = 1
    losses = [random.random(count) for count in counts]  # of each trained target

    def weighted(normalization, group):
        weights = loss_weights_per_example(counts, normalization, group)
        np.testing.assert_allclose((weights * counts).sum(), 1)
        return sum((w * x).sum() for w, x in zip(weights, losses, strict=True))

    np.testing.assert_allclose(weighted("tokens", 4), np.concatenate(losses).mean())
    for group in (1, 4, 100):
        means = []
        for start in range(0, len(losses), group):
            members = np.concatenate(losses[start : start + group])
            if len(members):
                means.append(members.mean())
        np.testing.assert_allclose(weighted("microbatch", group), np.mean(means))


def test_loss_weights_without_targets():
    for normalization in ("tokens", "microbatch"):
        weights = loss_weights_per_example([0, 0, 0], normalization, 2)
        assert weights.tolist() == [0, 0, 0]


def test_filled_rows_keep_examples_apart(make_dataset):
    dataset = make_dataset([3, 1, 4, 2])
    examples, rows, weights = [3, 0, 2], [[1, 0], [2], []], np.array([0.5, 0.25, 0.125])
    batch = fill_rows(dataset, examples, rows, 6, weights, pad_id=1)
    found = [dataset.example(i) for i in (0, 3, 2)]
    a, b, c = (example.tokens for example in found)
    trained_a, trained_b, trained_c = (example.in_loss for example in found)
    assert batch.tokens.tolist() == [[*a, *b, 1], [*c, 1, 1], [1] * 6]
    assert batch.targets.tolist() == [[*a[1:], 0, b[1], 0, 0], [*c[1:], 0, 0, 0], [0] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0] * 6]
    expected = [
        [*(trained_a[1:] * 0.25), 0, trained_b[1] * 0.5, 0, 0],
        [*(trained_c[1:] * 0.125), 0, 0, 0],
        [0] * 6,
    ]
    np.testing.assert_array_equal(batch.loss_weights, np.array(expected, np.float32))
    assert batch.loss_weights.dtype == np.float32
    for name in ("tokens", "targets", "segment_ids", "positions"):
        assert getattr(batch, name).dtype == np.int32


def test_a_batch_on_the_devices_has_the_same_arrays():
    """`place_batch` takes them in their order."""
    assert DeviceBatch._fields == Batch._fields
