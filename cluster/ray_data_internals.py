"""What is used of Ray Data outside its public interface: apart from cluster/ray_internals.py, which imports torch."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.interfaces import RefBundle
from ray.data._internal.execution.interfaces.ref_bundle import BlockEntry, BlockSlice
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import InputData
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockAccessor

#: Rows of one object of the object store.
ROWS_AN_OBJECT = 1000


def row_by_row(table: pa.Table) -> ray.data.Dataset:
    """A dataset that hands its first operator one row at a time, many of them from one object of the object store.

    `ray.data.from_items` with a block a row would put an object for each row, before the first one is handed out, and
    keep it to the end.
    """
    bundles = []
    for start in range(0, table.num_rows, ROWS_AN_OBJECT):
        part = table.slice(start, ROWS_AN_OBJECT).combine_chunks()
        put: Any = ray.put(part)
        whole = (BlockEntry(put, BlockAccessor.for_block(part).get_metadata()),)
        schema = part.schema  # Ray compares bundles by this very object
        for row in range(part.num_rows):
            one = (BlockSlice(row, row + 1),)
            bundles.append(RefBundle(whole, schema=schema, owns_blocks=False, slices=one))
    context = ray.data.DataContext.get_current().copy()
    plan = LogicalPlan(InputData(input_data=bundles), context)
    return ray.data.Dataset(plan, context, DatasetStats(metadata={}, parent=None))


class RowsOf(Iterator[dict[str, Any]]):
    """Run a pipeline: its rows, as each block is done. Its actors end with it: after the last row, by an error, or when
    this is closed before, by any thread.

    `iter_rows` and `iter_batches` do the same, but every five seconds they send the statistics of all blocks so far to
    another process: half a kilobyte for each, which takes 30 microseconds; at 100,000 blocks 3 of the 5 seconds. And
    they leave the actors of a pipeline that has ended to the garbage collection: until then these hold their CPUs, and
    the next pipeline waits.
    """

    def __init__(self, dataset: ray.data.Dataset) -> None:
        executor: Any = dataset._create_executor()
        shutdown = executor.shutdown
        executor.shutdown = lambda force, exception=None: shutdown(force=True, exception=exception)
        self._executor = executor
        self._rows = self._run(dataset)

    def __next__(self) -> dict[str, Any]:
        return next(self._rows)

    def close(self) -> None:
        self._executor.shutdown(force=True)

    def _run(self, dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
        try:
            for bundle in dataset._build_bundle_iterator(self._executor):
                for entry in bundle.blocks:
                    ref: Any = entry.ref
                    block: Any = ray.get(ref)
                    yield from BlockAccessor.for_block(block).to_arrow().to_pylist()
        finally:
            self.close()
