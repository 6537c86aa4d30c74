"""How many redraws of a row the steps before may have drawn: read from the lineage."""

import pytest

from cluster.curation.redraw.earlier import attempts_before
from cluster.dataset.lineage import Lineage, LineageSource

BEST_OF_3 = ({"method": "best-of-n", "best_of": 3}, {"curve": [{}, {}]})
FOUR_ROUNDS = ({"method": "redraw", "budget": 9}, {"curve": [{}] * 5})
SYNC = ({"method": "sync", "keep": 0.9}, {"moved": 5})


def made_of(step: tuple[dict, dict], *sources: Lineage | None) -> Lineage:
    settings, facts = step
    named = (
        LineageSource(
            path="/data", sha256="", rows=1, shards=1, planned_shards=1, generator="null",
            lineage=source and source.without_examples(),
        )
        for source in sources
    )  # fmt: skip
    return Lineage(method="refine", settings=settings, sources=tuple(named), rows_in=1, facts=facts)


def test_steps_one_after_the_other_count_on() -> None:
    assert attempts_before(None) == 0
    once = made_of(BEST_OF_3, None)
    assert attempts_before(once) == 2
    assert attempts_before(made_of(SYNC, once)) == 2
    assert attempts_before(made_of(FOUR_ROUNDS, made_of(SYNC, once))) == 6


def test_of_several_sources_the_one_with_most_counts() -> None:
    assert attempts_before(made_of(SYNC, None, made_of(BEST_OF_3, None), made_of(FOUR_ROUNDS, None))) == 4
    assert attempts_before(made_of(SYNC, None)) == 0


@pytest.mark.parametrize("step", [({"best_of": "many"}, {}), ({"best_of": 10**12}, {}), ({}, {"curve": 7})])
def test_a_damaged_lineage_is_told(step: tuple[dict, dict]) -> None:
    with pytest.raises((ValueError, TypeError)):
        attempts_before(made_of(step, None))
