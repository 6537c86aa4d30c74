"""The model of scores: its expectations are those of a simulation, whichever rows were chosen for their scores."""

import numpy as np
import pytest

from cluster.curation.redraw.choice import predicted_gain, ranked
from cluster.curation.redraw.scores import ASSUMED_CAPTION_SHARE, LEAST_REDRAWN, Scores
from cluster.curation.redraw.settings import GAIN, LOWEST, Policy

N = 20_000


def world(share: float, *, seed: int = 0, pictures: int = 4) -> np.ndarray:
    """(N, pictures) scores of which `share` of the variance is the caption's."""
    random = np.random.default_rng(seed)
    caption = random.normal(0.25, 0.03 * np.sqrt(share), (N, 1))
    return caption + random.normal(0, 0.03 * np.sqrt(1 - share), (N, pictures))


def redrawn(found: np.ndarray, rows: np.ndarray) -> Scores:
    """`rows` drawn again once."""
    return Scores.of(found[:, 0]).after(rows, np.ones(len(rows), int), found[rows, 1])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_captions_share_is_found_though_only_the_lowest_were_drawn_again(share: float) -> None:
    found = world(share)
    lowest = np.argsort(found[:, 0])[: N // 5]
    estimate, estimated = redrawn(found, lowest).caption_share
    assert estimated and estimate == pytest.approx(share, abs=0.03)


def test_before_enough_was_drawn_again_the_share_is_assumed() -> None:
    found = world(0.8)
    assert Scores.of(found[:, 0]).caption_share == (ASSUMED_CAPTION_SHARE, False)
    assert redrawn(found, np.arange(LEAST_REDRAWN - 1)).caption_share == (ASSUMED_CAPTION_SHARE, False)
    assert redrawn(found, np.arange(LEAST_REDRAWN)).caption_share[1]


@pytest.mark.parametrize("policy", [Policy(GAIN), Policy(LOWEST, 0.3)])
def test_the_expected_gain_is_what_a_round_gains(policy: Policy) -> None:
    found = world(0.6)
    first = np.argsort(found[:, 0])[: N // 4]
    scores = redrawn(found, first)
    rows = ranked(policy, scores)[: N // 5]
    again = np.isin(rows, first)
    gained = np.maximum(np.where(again, found[rows, 2], found[rows, 1]) - scores.best[rows], 0).sum()
    assert scores.gain_of_several(rows, 1) == pytest.approx(gained, rel=0.05)


def test_the_expected_gain_of_best_of_n_is_what_it_gains() -> None:
    found = world(ASSUMED_CAPTION_SHARE)
    scores = Scores.of(found[:, 0])
    gained = (found.max(axis=1) - found[:, 0]).sum()
    assert scores.gain_of_several(np.arange(N), 3) == pytest.approx(gained, rel=0.03)
    assert scores.gain_of_several(np.arange(N), 0) == 0


def test_gain_chooses_what_gains_more_than_chance() -> None:
    found = world(0.5)
    scores = Scores.of(found[:, 0])
    gain = np.maximum(found[:, 1] - found[:, 0], 0)
    chosen = gain[ranked(Policy(GAIN), scores)[: N // 10]].mean()
    assert chosen > 2 * gain.mean()


def test_the_best_so_far_and_the_number_of_tries_are_kept() -> None:
    scores = Scores.of(np.array([0.2, 0.3, 0.1], np.float32))
    rows, attempts = np.array([0, 0, 2, 1]), np.array([1, 2, 1, 1])
    scores = scores.after(rows, attempts, np.array([0.1, 0.5, np.nan, 0.2]))
    np.testing.assert_allclose(scores.best, [0.5, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(scores.count, [3, 2, 1])
    np.testing.assert_array_equal(scores.tried, [2, 1, 1])
    np.testing.assert_array_equal(scores.failed, [0, 0, 1])


@pytest.mark.parametrize("policy", [Policy(GAIN), Policy(LOWEST, 0.1)])
def test_a_caption_that_cannot_be_drawn_takes_no_more_than_one_round(policy: Policy) -> None:
    """The three lowest of 100 never can; in ten rounds of three they are drawn once."""
    found = world(0.5)[:100]
    scores = Scores.of(found[:, 0])
    never = np.argsort(found[:, 0])[:3]
    drawn = []
    for _ in range(10):
        rows = ranked(policy, scores)[:3]
        attempts = scores.tried[rows] + 1
        scores = scores.after(rows, attempts, np.where(np.isin(rows, never), np.nan, found[rows, attempts % 4]))
        drawn += rows.tolist()
    assert [drawn.count(row) for row in never] == [1, 1, 1] and len(set(drawn)) > 6
    assert set(ranked(Policy(GAIN), scores)[-3:]) == set(never), "after all others"


def test_equal_scores_are_ordered_by_sample_id() -> None:
    scores = Scores.of(np.array([0.2, 0.1, 0.2, 0.1], np.float32))
    for policy in (Policy(GAIN), Policy(LOWEST, 1.0)):
        assert ranked(policy, scores).tolist() == [1, 3, 0, 2]
    assert len(ranked(Policy(LOWEST, 0.01), scores)) == 1, "at least one row"


def test_scores_that_are_all_equal_gain_nothing_and_break_nothing() -> None:
    scores = Scores.of(np.full(5, 0.25, np.float32))
    assert scores.expected_gain().tolist() == [0] * 5
    assert predicted_gain(Policy(), scores, 12) == 0
