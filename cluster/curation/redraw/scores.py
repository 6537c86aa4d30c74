"""What is known of each row's pictures: the scores of those that were drawn, and what one more is expected to gain.

Scores are modelled as x = mu + e: mu of the caption, e of the picture, both normal. m and V are the mean and variance
of the stored pictures' scores. rho, the share of V that is the caption's, is the slope of a regression of the first
redraw's score on the stored picture's; that slope is the same whichever rows are redrawn for their stored score. With k
scores of mean x the next one has

    mean m + k rho / (1 + (k - 1) rho) (x - m),    variance V (1 - rho) (1 + rho / (1 + (k - 1) rho)),

and its expected gain over the best so far is the expected improvement of Jones et al. (1998).
"""

import math
from dataclasses import dataclass

import numpy as np

#: rho before anything has been drawn again.
ASSUMED_CAPTION_SHARE = 0.5
#: First redraws from which rho is estimated.
LEAST_REDRAWN = 20
#: Expected gains are compared in whole units of this, so that the last bits of a processor decide nothing.
UNIT = 1e-9
#: Rows at which the gain of several pictures is integrated; between them it changes little.
_INTEGRATED_ROWS = 500


@dataclass(frozen=True)
class Scores:
    """Of n rows: the stored picture's score, how many scores there are, their sum, the best, the first redraw's (NaN
    where there is none), all float64; and the number of redraws that were tried, and of those that failed, int64."""

    stored: np.ndarray
    count: np.ndarray
    total: np.ndarray
    best: np.ndarray
    first_redraw: np.ndarray
    tried: np.ndarray
    failed: np.ndarray

    def __len__(self) -> int:
        return len(self.stored)

    @staticmethod
    def of(stored: np.ndarray) -> "Scores":
        """Nothing has been drawn again."""
        exact = stored.astype(np.float64)
        return Scores(
            exact,
            np.ones(len(exact)),
            exact.copy(),
            exact.copy(),
            np.full(len(exact), np.nan),
            np.zeros(len(exact), int),
            np.zeros(len(exact), int),
        )

    def after(self, rows: np.ndarray, attempts: np.ndarray, scores: np.ndarray) -> "Scores":
        """With a round's pictures: (p,) row, which redraw, score (NaN where the picture could not be made)."""
        count, total, best = self.count.copy(), self.total.copy(), self.best.copy()
        first, tried, failed = self.first_redraw.copy(), self.tried.copy(), self.failed.copy()
        np.maximum.at(tried, rows, attempts)
        made = np.isfinite(scores)
        np.add.at(failed, rows[~made], 1)
        rows, attempts, scores = rows[made], attempts[made], scores[made].astype(np.float64)
        np.add.at(count, rows, 1)
        np.add.at(total, rows, scores)
        np.maximum.at(best, rows, scores)
        first[rows[attempts == 1]] = scores[attempts == 1]
        return Scores(self.stored, count, total, best, first, tried, failed)

    @property
    def caption_share(self) -> tuple[float, bool]:
        """(rho, whether it was estimated). Only the first redraw of a row counts: later ones depend on it."""
        redrawn = np.isfinite(self.first_redraw)
        mean = self.stored.mean()
        before, after = self.stored[redrawn] - mean, self.first_redraw[redrawn] - mean
        spread = float((before**2).sum())
        if redrawn.sum() < LEAST_REDRAWN or spread == 0:
            return ASSUMED_CAPTION_SHARE, False
        return float(np.clip((before * after).sum() / spread, 0.0, 0.99)), True

    def next_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) mean and standard deviation of each row's next score."""
        rho, _ = self.caption_share
        mean, variance = self.stored.mean(), self.stored.var()
        known = 1 + (self.count - 1) * rho
        expected = mean + self.count * rho / known * (self.total / self.count - mean)
        return expected, np.sqrt(variance * (1 - rho) * (1 + rho / known))

    def expected_gain(self) -> np.ndarray:
        """(n,) what one more picture is expected to add to each row's best score, in whole units of UNIT."""
        mean, deviation = self.next_picture()
        above = np.divide(mean - self.best, deviation, out=np.zeros(len(self)), where=deviation > 0)
        density = np.exp(-(above**2) / 2) / math.sqrt(2 * math.pi)
        gain = deviation * (above * _normal_cdf(above) + density)
        return np.rint(np.maximum(gain, 0) / UNIT) * UNIT

    def gain_of_several(self, rows: np.ndarray, pictures: int) -> float:
        """What `pictures` more of each of these rows are expected to add to their best scores, in all."""
        if not len(rows) or pictures < 1:
            return 0.0
        if pictures == 1:
            return float(self.expected_gain()[rows].sum())
        order = rows[np.argsort(self.best[rows], kind="stable")]
        some = order[np.linspace(0, len(order) - 1, min(len(order), _INTEGRATED_ROWS)).astype(int)]
        gain = self._integrated_gain(some, pictures)
        return float(gain.mean() * len(rows))

    def _integrated_gain(self, rows: np.ndarray, pictures: int) -> np.ndarray:
        """(r,) the integral of P(one of the pictures scores x or more) over x above the best so far. The pictures are
        independent given mu, over which Gauss-Hermite quadrature goes."""
        mean, deviation = (values[rows, np.newaxis] for values in self.next_picture())
        rho, _ = self.caption_share
        of_picture = math.sqrt(self.stored.var() * (1 - rho))
        if of_picture == 0:
            return np.zeros(len(rows))
        of_caption = np.sqrt(np.maximum(deviation**2 - of_picture**2, 0))  # how far mu is unknown
        best = self.best[rows, np.newaxis]
        end = np.maximum(best, mean) + 8 * deviation
        places = best + (end - best) * np.linspace(0, 1, 200)  # (r, 200)
        below = np.zeros_like(places)
        nodes, weights = np.polynomial.hermite_e.hermegauss(9)
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            below += weight * _normal_cdf((places - mean - of_caption * node) / of_picture) ** pictures
        reached = 1 - below
        return ((reached[:, 1:] + reached[:, :-1]) / 2 * np.diff(places, axis=1)).sum(axis=1)


def _normal_cdf(values: np.ndarray) -> np.ndarray:
    flat = [0.5 * math.erfc(value) for value in (values / -math.sqrt(2)).reshape(-1).tolist()]
    return np.array(flat).reshape(values.shape)
