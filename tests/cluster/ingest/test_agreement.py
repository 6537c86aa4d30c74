"""Correlations of two CLIPs' scores are those of their definitions."""

import numpy as np
import pytest
from scipy import stats

from cluster.ingest.agreement import EXAMPLES, agreement, most_different, ranks


def test_correlations_are_scipys_with_ties_too() -> None:
    random = np.random.default_rng(3)
    before = random.integers(0, 12, 200).astype(np.float32) / 40
    after = (before + random.normal(0, 0.05, 200)).astype(np.float32)
    found = agreement(before, after)
    assert found["rows"] == 200
    assert found["pearson"] == pytest.approx(stats.pearsonr(before.astype(np.float64), after).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(before, after).statistic, abs=1e-9)
    np.testing.assert_array_equal(ranks(before), stats.rankdata(before))


def test_scores_that_do_not_vary_have_no_correlation() -> None:
    flat = np.full(5, 0.25, np.float32)
    found = agreement(flat, np.arange(5, dtype=np.float32))
    assert found == {"rows": 5, "pearson": None, "spearman": None}


def test_the_pairs_that_are_ranked_most_differently_come_first_and_ties_by_id() -> None:
    before = np.arange(10, dtype=np.float32)
    after = before.copy()
    after[[0, 9]] = after[[9, 0]]
    ids = np.array([f"{number:09d}-00" for number in range(10)])
    assert most_different(before, after, ids).tolist() == [0, 9, 1, 2, 3, 4][:EXAMPLES]
