"""How sure a difference is, where seeds and test pictures both are samples.

A setting's scores are a matrix (S, n): S seeds, n test pictures. Two settings have the same seeds and the same
pictures, so their difference is taken entry by entry, and its mean is the estimate. Its standard error is that of a
bootstrap over both: S - 1 of the seeds and n - 1 of the pictures are drawn with replacement, B times, and the mean over
the drawn rows and columns is taken; the standard deviation of these means is the standard error. (One fewer than there
are: drawing all S would make the variance too small by (S - 1) / S.) Half the 95 % interval is t(0.975, S - 1) standard
errors, because a few seeds tell their own spread badly. What a seed does to one picture alone counts in both draws, so
the interval is rather too wide than too narrow.

Of runs of which only the mean over the pictures was kept the matrix is (S, 1), and seeds alone count.
"""

import math
from dataclasses import dataclass

import numpy as np

#: Draws of the bootstrap, and their seed: the same scores give the same interval.
DRAWS = 4000
DRAWS_SEED = 0

#: t(0.975, df) by df from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean and half its 95 % interval; infinity where one seed alone cannot tell."""

    mean: float
    half: float
    seeds: int
    by_picture: bool = True  # whether the noise of the pictures counts

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def estimate(scores: np.ndarray) -> Estimate:
    """Of one setting (S, n) or (S, 1), or of the difference of two, paired by seed and picture."""
    seeds, pictures = scores.shape
    mean = float(scores.mean())
    if seeds < 2:
        return Estimate(mean, math.inf, seeds)
    by_picture = pictures > 1
    error = standard_error(scores) if by_picture else seed_spread(scores) / math.sqrt(seeds)
    return Estimate(mean, t_quantile(seeds - 1) * error, seeds, by_picture)


def standard_error(scores: np.ndarray) -> float:
    """Of the mean of (S, n), by the bootstrap over seeds and pictures; S and n at least 2."""
    seeds, pictures = scores.shape
    random = np.random.default_rng(DRAWS_SEED)
    rows = _drawn(random, seeds)  # (B, S)
    columns = _drawn(random, pictures)  # (B, n)
    return float(((rows @ scores) * columns).sum(axis=1).std())


def _drawn(random: np.random.Generator, count: int) -> np.ndarray:
    """(B, count) weights, each row of sum 1: how often each of `count` was drawn in count - 1 draws."""
    drawn = random.multinomial(count - 1, np.full(count, 1 / count), size=DRAWS)
    return drawn / (count - 1)


def seed_spread(scores: np.ndarray) -> float:
    """Standard deviation over seeds of the means over pictures; not a number of fewer than two seeds."""
    return float(scores.mean(axis=1).std(ddof=1)) if len(scores) > 1 else math.nan


def seeds_needed(spread: float, *, difference: float) -> int:
    """The fewest seeds with which a true difference of `difference` lies outside half an interval of paired seeds.

    `spread`: standard deviation over seeds of the paired differences. Counts the noise of the seeds alone.
    """
    for seeds in range(2, 1000):
        if t_quantile(seeds - 1) * spread / math.sqrt(seeds) <= difference:
            return seeds
    return 1000


def t_quantile(degrees: int) -> float:
    """t(0.975) of so many degrees of freedom; from 16 on by the first terms of its expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * degrees)
