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
    """A mean, and its 95% interval; NaN where one seed alone says nothing of others."""

    value: float
    low: float
    high: float


def interval(tables: Sequence[np.ndarray], tasks: int = 0) -> Interval:
    """Returns the mean over the tables, with a hierarchical bootstrap's percentile interval.

    Within each table, a resample draws seeds with replacement, one fewer than there are: as many
    would make the interval too short. Then it draws rows with replacement, the same rows for all
    its seeds. It draws no targets: each table is one.

    Args:
      tables: [seeds, rows] each.
      tasks: 0: each table has its own rows, drawn for itself. Otherwise all tables share their
        rows, drawn once, within each of `tasks` equal parts: a part holds the rows of one task.
    """
    value = float(np.mean([table.mean() for table in tables]))
    if min(len(table) for table in tables) < 2:
        return Interval(value, np.nan, np.nan)
    random = np.random.default_rng(0)
    total, rows = np.zeros(RESAMPLES), None
    for table in tables:
        seeds = _weights(random, len(table), len(table) - 1)
        if rows is None or not tasks:
            each = table.shape[1] // (tasks or 1)
            parts = [_weights(random, each, each) for _ in range(tasks or 1)]
            rows = np.concatenate(parts, axis=1) / len(parts)
        total += np.einsum("is,sn,in->i", seeds, table, rows, optimize=True)
    low, high = np.percentile(total / len(tables), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _weights(random: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """Returns how often each of `count` things is drawn in each resample, as shares."""
    return random.multinomial(draws, np.full(count, 1 / count), RESAMPLES) / draws


def paired_p(differences: Sequence[np.ndarray]) -> float:
    """Returns the two-sided p of no difference between two methods, by random signs.

    If the methods did not differ, the two runs of a target and seed could change places. The test
    draws no rows: each run is one number, its mean.

    Args:
      differences: [seeds, rows] for each target.
    """
    return permutation_test(np.concatenate([table.mean(axis=1) for table in differences]))
