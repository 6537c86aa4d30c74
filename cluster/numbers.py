"""Numbers, sizes and times as people read them."""

import math
from datetime import UTC, datetime

from cluster.generation.display import duration


def count(value: int) -> str:
    """12,345"""
    return f"{value:,}"


def short(value: float) -> str:
    """Three digits or so: 0.802, 12.3, 1,240, 3.1e-05."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.0001:
        return f"{value:.3g}"
    return f"{value:.1e}"


def score(value: float | None) -> str:
    """A cosine: three decimals."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def times_100(value: float | None) -> str:
    """A metric in the papers' unit: 148.7."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def percent(share: float) -> str:
    """0 %, <0.1 %, 4.1 %, 37 %"""
    value = 100 * share
    if value == 0 or value >= 10:
        return f"{value:.0f}\u00a0%"
    return f"{value:.2g}\u00a0%" if value >= 0.1 else "<0.1\u00a0%"


def spent(seconds: float) -> str:
    """As cluster.generation.display.duration, with a digit more below ten seconds."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def moment(timestamp: float) -> str:
    """2026-03-01 14:05 UTC"""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
