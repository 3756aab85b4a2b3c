"""Intervals over seeds and rows, and paired tests between methods.

A table [seeds, rows] holds what runs of one target did with the rows of one test; every seed meets
the same rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.statistics import permutation_test

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean, and its 95% interval."""

    value: float
    low: float
    high: float


def interval(tables: Sequence[np.ndarray], same_rows: bool = False) -> Interval:
    """Returns the mean over the tables, with a hierarchical bootstrap's percentile interval.

    A resample draws seeds with replacement within each table, and rows with replacement, the same
    rows for all its seeds. The targets, of which each table is one, are not drawn.

    Args:
      tables: [seeds, rows] each.
      same_rows: the rows are the same in all tables, and drawn once for all.
    """
    random = np.random.default_rng(0)
    drawn, weights = np.zeros(RESAMPLES), None
    for table in tables:
        seeds, rows = (_weights(random, count) for count in table.shape)
        weights = weights if same_rows and weights is not None else rows
        drawn += np.einsum("is,sn,in->i", seeds, table, weights, optimize=True)
    low, high = np.percentile(drawn / len(tables), [2.5, 97.5])
    return Interval(float(np.mean([table.mean() for table in tables])), float(low), float(high))


def _weights(random: np.random.Generator, count: int) -> np.ndarray:
    """Returns how often each of `count` things is drawn in each resample, as shares."""
    return random.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def paired_p(differences: Sequence[np.ndarray]) -> float:
    """Returns the two-sided p of no difference between two methods, by random signs.

    Without a difference, the two runs of a target and seed could change places. The test takes the
    rows as they are, each run's mean as one number.

    Args:
      differences: [seeds, rows] for each target.
    """
    return permutation_test(np.concatenate([table.mean(axis=1) for table in differences]))
