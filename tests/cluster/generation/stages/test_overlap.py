"""While one shard is stored the next is worked on, and an error comes out of its own call."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from cluster.generation.stages.overlap import Overlap

SECONDS = 30.0  # an event that does not come within them is a failure


def table(number: int) -> pa.Table:
    return pa.table({"number": [number]})


def test_a_shard_is_stored_while_the_next_is_worked_on() -> None:
    second_begun, stored_by, worked_by = threading.Event(), set(), set()

    def store(done: pa.Table) -> pa.Table:
        stored_by.add(threading.get_ident())
        assert second_begun.wait(SECONDS), "the second one waits for the first to be stored"
        return done

    def work(number: int) -> pa.Table:
        worked_by.add(threading.get_ident())
        if number == 1:
            second_begun.set()
        return table(number)

    overlap = Overlap(store)
    with ThreadPoolExecutor(2) as calls:
        results = list(calls.map(lambda number: overlap.run(lambda: work(number)), range(2)))
    assert results == [table(0), table(1)]
    assert (len(worked_by), len(stored_by)) == (1, 1) and worked_by != stored_by


def test_work_may_wait_until_what_was_before_it_is_stored() -> None:
    go_on, stored = threading.Event(), []

    def store(done: pa.Table) -> pa.Table:
        assert go_on.wait(SECONDS)
        stored.append(done["number"][0].as_py())
        return done

    overlap = Overlap(store)

    def work() -> pa.Table:
        go_on.set()
        overlap.wait()
        assert stored == [0]
        return table(1)

    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(overlap.run, lambda: table(0))
        second = calls.submit(overlap.run, work)
        assert (first.result(SECONDS), second.result(SECONDS)) == (table(0), table(1))
    assert stored == [0, 1]


def test_where_there_is_no_work_nothing_is_stored() -> None:
    assert Overlap(fails).run(lambda: None) is None


@pytest.mark.parametrize(
    ("work", "store"), [(lambda: fails(table(0)), table), (lambda: table(0), lambda done: fails(done))]
)
def test_an_error_of_either_thread_comes_out_of_the_call(
    work: Callable[[], pa.Table], store: Callable[[pa.Table], pa.Table]
) -> None:
    overlap = Overlap(store)
    for _ in range(2):
        with pytest.raises(OSError, match="no room for 1 row"):
            overlap.run(work)


def fails(done: pa.Table) -> pa.Table:
    raise OSError(f"no room for {len(done)} row")
