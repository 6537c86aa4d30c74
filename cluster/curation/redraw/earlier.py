"""How many redraws of a row the steps before may have drawn, as the lineage of a dataset says.

A step counts on from there, so that it draws no picture that one before it drew: where the stored picture won, its seed
is the same as then. Only lineages are read, so it does not matter what has become of the datasets between.
"""

from collections.abc import Sequence
from typing import Any

from cluster.dataset.lineage import Lineage

#: The largest number that is believed: what the column `attempt` of attempts.parquet holds leaves room for this step's.
_MOST = 2**30


def attempts_before(lineage: Lineage | None) -> int:
    """The highest number that a redraw of a row of this dataset can have; 0 where nothing was drawn again. Of several
    sources that of the one with most. Raises ValueError, TypeError or LookupError for a lineage that is damaged."""
    if lineage is None:
        return 0
    sources = (Lineage.from_dict(each.lineage) for each in lineage.sources if each.lineage is not None)
    found = _attempts(lineage.settings, lineage.facts.get("curve")) + max(map(attempts_before, sources), default=0)
    if not 0 <= found <= _MOST:
        raise ValueError(f"its steps drew a row {found} times")
    return found


def _attempts(settings: dict[str, Any], curve: Sequence[Any] | None) -> int:
    """Redraws of one row at most in one step: those of best-of-n, or one a round. curve: a point before the rounds, and
    one after each."""
    if "best_of" in settings:
        return int(settings["best_of"]) - 1
    return len(curve) - 1 if curve else 0
