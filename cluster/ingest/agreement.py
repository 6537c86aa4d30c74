"""How far two CLIPs' scores of the same pairs agree."""

import numpy as np

#: Pairs that are named because the two CLIPs rank them most differently.
EXAMPLES = 6


def agreement(before: np.ndarray, after: np.ndarray) -> dict[str, float | int | None]:
    """rows, pearson and spearman of (n,) scores each. A correlation is None where one of the two does not vary."""
    return {
        "rows": len(before),
        "pearson": _correlation(before.astype(np.float64), after.astype(np.float64)),
        "spearman": _correlation(ranks(before), ranks(after)),
    }


def most_different(before: np.ndarray, after: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """The rows whose ranks differ most, at most EXAMPLES, the largest difference first; ties by sample id."""
    difference = np.abs(ranks(before) - ranks(after))
    return np.lexsort((sample_ids, -difference))[:EXAMPLES]


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) float64 from 1, the lowest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    one, other = one - one.mean(), other - other.mean()
    length = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / length) if length > 0 else None
