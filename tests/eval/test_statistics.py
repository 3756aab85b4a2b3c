"""Scores whose values can be checked by hand."""

import itertools

import numpy as np
import pytest
import sacrebleu

from eval.statistics import (
    corpus_metrics,
    mean_metric,
    pass_at_k,
    rouge_l,
    rouge_words,
    sentence_chrf,
    wilson,
)


def test_mean_and_interval():
    metric = mean_metric([1, 0, 0, 1])
    assert (metric.value, metric.rows) == (50, 4)
    assert metric.low < 50 < metric.high
    assert mean_metric([1, 0, 0, 1]) == metric
    always = mean_metric([1.0] * 5)
    # By Wilson's formula: 5 / (5 + 1.96^2).
    assert (always.value, always.high) == (100, 100)
    assert always.low == pytest.approx(100 * 5 / (5 + 1.96**2), abs=0.01)
    assert mean_metric([0.0]).low == 0 < mean_metric([0.0]).high < 100
    same = mean_metric([0.25] * 9)
    assert (same.value, same.low, same.high) == (25, None, None)
    part = mean_metric([0.5, 0.25, 1.0])
    assert 25 <= part.low < part.value < part.high <= 100
    assert all(0 <= bound <= 100 for n in range(4) for bound in wilson(n, 3))
    values = np.arange(400) % 2  # the standard error of the mean is 2.5
    wide = mean_metric(values)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 2.5, rel=0.1)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 3), (2, 3, 1), (2, 1, 0)])
def test_pass_at_k_of_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_rouge_words():
    assert rouge_words("驳回原告的诉讼请求，受理费200元。The Cat's") == [
        *"驳回原告的诉讼请求受理费", "200", "元", "the", "cat", "s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1),
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman killed police", "police killed the gunman", 2 / 4),
        ("判决离婚", "判决不准离婚", 2 * 4 / (4 + 6)),
        ("", "abc", 0),
        ("。，", "abc", 0),
        ("abc", "xyz", 0),
    ],
)
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_equals_the_table_of_the_textbook():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = (random.choice(list("abcd"), random.integers(1, 40)) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in np.ndindex(len(a), len(b)):
            best = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else best
        expected = 2 * table[-1, -1] / (len(a) + len(b))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_chrf_and_bleu():
    references = ["for I will give you a mouth and wisdom", "You have chosen a hallowed door."]
    same = corpus_metrics(references, references)
    assert same["chrf"].value == pytest.approx(100)
    assert same["bleu"].value == pytest.approx(100)
    other = corpus_metrics(["for you a mouth", "You have chosen a door."], references)
    for metric in other.values():
        assert 0 < metric.low < metric.value < metric.high < 100
        assert metric.rows == 2
    assert list(other) == ["chrf", "bleu"]
    theirs = sacrebleu.corpus_chrf(["for you a mouth", "You have chosen a door."], [references])
    assert other["chrf"].value == pytest.approx(theirs.score)
    assert sentence_chrf("abc", "abc") == pytest.approx(1)
    assert sentence_chrf("", "abc") == 0
