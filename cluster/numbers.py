"""Numbers, sizes and times as people read them."""

import math
from datetime import UTC, datetime

#: The time of a log line, by which runs of days and machines of several time zones are told apart:
#: 2026-03-01 14:05:09+0000.
LOG_TIME = "%Y-%m-%d %H:%M:%S%z"


def count(value: int) -> str:
    """12,345"""
    return f"{value:,}"


def short(value: float) -> str:
    """Three digits or so: 0.802, 12.3, 1,240, 3.1e-05."""
    if not math.isfinite(value):
        return "-"
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude == 0 or magnitude >= 0.0001:
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
    """As `duration`, with a digit more below ten seconds."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def moment(timestamp: float) -> str:
    """2026-03-01 14:05 UTC"""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """'42 s', '7 min 05 s', '15 h 38 min', '3 d 4 h'."""
    if not math.isfinite(seconds):
        return "an unlimited time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """'12.3 MB': bytes in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
