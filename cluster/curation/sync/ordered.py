"""Rows and pictures by sample id, for a dataset that stores them in another order, as a view does.

Of equals the first row counts, so rows are numbered by sample id. What follows knows no other order.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from cluster.curation.sync.objects import run_missing
from cluster.curation.sync.vectors import GROUP_ROWS, PICTURES, Group, StoredParts, array_bytes, piece_key, rows_key
from cluster.curation.tasks import Tasks
from cluster.dataset.parquet import parquet_bytes, read_table
from cluster.store.store import Store

#: Groups that a task writes. It reads all pictures for them.
GROUPS_AT_ONCE = 32

_READS_AT_ONCE = 8


def in_order(out: Store, work: str, groups: Sequence[Group], tasks: Tasks) -> tuple[str, list[Group]]:
    """Where rows and pictures lie by sample id, and in which groups: the given ones where they lie so already.

    Memory of a task: the pictures of GROUPS_AT_ONCE groups, half a GiB of 512 dimensions.
    """
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        sample_ids = np.concatenate(list(pool.map(lambda group: _sample_ids(out, work, group), groups)))
    if (sample_ids[:-1] < sample_ids[1:]).all():
        return work, list(groups)
    order, ordered = np.argsort(sample_ids), f"{work}/ordered"
    starts = range(0, len(order), GROUP_ROWS)
    found = [Group(number, start, min(GROUP_ROWS, len(order) - start)) for number, start in enumerate(starts)]
    calls: dict[tuple[str, ...], tuple] = {}
    for first in range(0, len(found), GROUPS_AT_ONCE):
        some = found[first : first + GROUPS_AT_ONCE]
        numbers = order[some[0].first_row : some[-1].first_row + some[-1].rows]
        calls[tuple(key for each in some for key in _keys(ordered, each))] = (
            out, work, list(groups), ordered, some, numbers
        )  # fmt: skip
    run_missing(tasks, out, work, _store_ordered, calls, what="rows in order")
    return ordered, found


def _store_ordered(
    out: Store, work: str, groups: Sequence[Group], ordered: str, some: Sequence[Group], numbers: np.ndarray
) -> None:
    """The rows `numbers` of all, as `some` groups in this order."""
    ascending = np.sort(numbers)
    back = np.searchsorted(ascending, numbers)
    parts = StoredParts(out, [piece_key(work, PICTURES, group.number) for group in groups], [g.rows for g in groups])
    pictures = parts.take(ascending)
    tables = []
    for group in groups:
        first, last = np.searchsorted(ascending, [group.first_row, group.first_row + group.rows])
        if last > first:
            table = read_table(out, rows_key(work, group.number))
            tables.append(table.take(ascending[first:last] - group.first_row))
    rows = pa.concat_tables(tables).combine_chunks()
    for group in some:
        start = group.first_row - some[0].first_row
        mine = back[start : start + group.rows]
        of_pictures, of_rows = _keys(ordered, group)
        out.write_bytes(of_pictures, array_bytes(pictures[mine]))
        out.write_bytes(of_rows, parquet_bytes(rows.take(mine)))


def _keys(work: str, group: Group) -> tuple[str, str]:
    return piece_key(work, PICTURES, group.number), rows_key(work, group.number)


def _sample_ids(out: Store, work: str, group: Group) -> np.ndarray:
    return np.array(read_table(out, rows_key(work, group.number), ["sample_id"])["sample_id"].to_pylist())
