"""Statistics over rows: bootstrap intervals, paired tests, pass@k, ROUGE-L, BLEU, chrF."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES, _PERMUTATIONS = 1000, 10_000
_SEED = 0


@dataclass(frozen=True)
class Metric:
    """A score in percent over `rows` rows; `low` and `high` bound its 95% interval, if any."""

    value: float
    low: float | None
    high: float | None
    rows: int


def bootstrap(rows: np.ndarray, score: Callable[[np.ndarray], float]) -> Metric:
    """Returns a score and its 95% percentile interval, or none where all samples score the same.

    The seed is fixed: the same rows give the same interval.

    Args:
      rows: what each row contributes, statistics [rows, ...] that add up.
      score: returns the score in percent from the sum over a sample of the rows.
    """
    random = np.random.default_rng(_SEED)
    count = len(rows)
    drawn = [score(rows[random.integers(0, count, count)].sum(axis=0)) for _ in range(_RESAMPLES)]
    # Where nothing varies, the samples say nothing about other rows: no interval is known.
    varies = max(drawn) - min(drawn) > 1e-9
    low, high = map(float, np.percentile(drawn, [2.5, 97.5])) if varies else (None, None)
    return Metric(float(score(rows.sum(axis=0))), low, high, count)


def mean_metric(values: Sequence[float]) -> Metric:
    """Returns the mean of the rows' scores (0 to 1) in percent.

    The interval is Wilson's if rows are right or wrong, else a bootstrap interval.
    """
    rows = np.asarray(values, np.float64)
    if np.isin(rows, (0, 1)).all():
        return Metric(float(100 * rows.mean()), *wilson(int(rows.sum()), len(rows)), len(rows))
    return bootstrap(rows, lambda total: 100 * total / len(rows))


def wilson(right: int, rows: int) -> tuple[float, float]:
    """Returns the 95% score interval (Wilson 1927) of a share, in percent.

    It lies within 0 and 100, and has a width where all rows are right or all are wrong.
    """
    z = 1.959964
    share, scale = right / rows, 1 + z * z / rows
    center = (share + z * z / (2 * rows)) / scale
    margin = z / scale * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return 100 * max(0.0, center - margin), 100 * min(1.0, center + margin)


@dataclass(frozen=True)
class Difference:
    """A mean difference of paired scores, in the unit of `paired_difference`.

    `low` and `high` bound the 95% bootstrap interval, None where all rows differ by the same; `p`
    is the p value of the two-sided `test`.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    test: str
    rows: int


def paired_difference(a: Sequence[float], b: Sequence[float], unit: float = 100.0) -> Difference:
    """Returns a - b for the scores of the same rows in the same order, as a mean times `unit`.

    The default unit shows scores of 0 to 1 in percent. McNemar's exact test compares scores that
    are all 0 or 1, a permutation test all others.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    differences = first - second
    metric = bootstrap(differences, lambda total: unit * total / len(differences))
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        test, p = "McNemar", mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        test, p = "permutation", permutation_test(differences)
    return Difference(metric.value, metric.low, metric.high, p, test, metric.rows)


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided p of McNemar's exact test (McNemar 1947).

    The arguments count the rows that only one of two methods got right. Without a difference each
    of them falls to either method with probability 1/2 (a binomial test).
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**discordant)


def permutation_test(differences: np.ndarray) -> float:
    """Returns the two-sided p of a mean difference by random signs (Fisher 1935).

    p is the share of 10,000 draws of signs whose mean is as far from 0. The observed signs count as
    one more draw, so that p is never 0. The seed is fixed.
    """
    random = np.random.default_rng(_SEED)
    signs = random.integers(0, 2, (_PERMUTATIONS, len(differences)), np.int8) * 2 - 1
    observed = abs(differences.sum())
    # Sums of the same numbers in another order must count as equal.
    hits = np.count_nonzero(np.abs(signs @ differences) >= observed - 1e-9)
    return (hits + 1) / (_PERMUTATIONS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p values adjusted for their number (Holm 1979), in the same order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns the probability that one of k of the samples, drawn without replacement, is correct.

    This is the unbiased estimator of Chen et al. 2021 ("Evaluating Large Language Models Trained on
    Code"), 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


# Chinese is written without spaces: each character is a word of its own (Han, Kana, Hangul).
_WORD = re.compile(
    r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af\U00020000-\U0003ffff]"
    r"|[^\W_\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af\U00020000-\U0003ffff]+"
)


def rouge_words(text: str) -> list[str]:
    """Returns the words that ROUGE-L compares: lowercase words and single Chinese characters."""
    return _WORD.findall(text.lower())


def rouge_l(prediction: str, reference: str) -> float:
    """Returns the F1 of the longest common subsequence (Lin 2004), 0 to 1; 0 if one is empty."""
    words, expected = rouge_words(prediction), rouge_words(reference)
    common = _longest_common_subsequence(words, expected)
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length, by Hyyrö's bit-parallel algorithm: a row of the table is one integer."""
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(a)) - 1
    row = everything
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def corpus_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """Returns sacrebleu's corpus chrF2 and BLEU (13a tokens)."""
    from sacrebleu.metrics import BLEU, CHRF

    metrics = {}
    # force: sacrebleu would warn of predictions that end in " .", which a model may write.
    for name, scorer in {"chrf": CHRF(), "bleu": BLEU(force=True)}.items():
        # The steps of corpus_score. Its own bootstrap fails on the float32 scores of chrF.
        rows = np.asarray(scorer._extract_corpus_statistics(predictions, [references]))
        metrics[name] = bootstrap(
            rows, lambda total, s=scorer: float(s._compute_score_from_stats(total.tolist()).score)
        )
    return metrics


def sentence_chrf(prediction: str, reference: str) -> float:
    """Returns one row's chrF2, 0 to 1."""
    import sacrebleu

    return sacrebleu.sentence_chrf(prediction, [reference]).score / 100
