"""Which rows are drawn again in a round: a function of what the completed rounds gave, and of nothing else."""

import numpy as np

from cluster.curation.redraw.scores import Scores
from cluster.curation.redraw.settings import GAIN, Policy


def ranked(policy: Policy, scores: Scores) -> np.ndarray:
    """Rows that may be drawn again, the first choice first; ties by the number of the row: the order of sample ids.

    Rows of which fewer redraws failed come first: a caption that fails with all its seeds mostly fails again, and its
    expected gain stays as it was.
    """
    number = np.arange(len(scores))
    if policy.choose == GAIN:
        return np.lexsort((number, -scores.expected_gain(), scores.failed))
    most = max(1, int(policy.lowest * len(scores)))
    return np.lexsort((number, scores.best, scores.failed))[:most]


def predicted_gain(policy: Policy, scores: Scores, pictures: int) -> float:
    """What so many pictures, chosen by what is known now, are expected to add to the rows' best scores, in all."""
    rows = ranked(policy, scores)
    each, more = divmod(pictures, len(rows))
    return scores.gain_of_several(rows[:more], each + 1) + scores.gain_of_several(rows[more:], each)
