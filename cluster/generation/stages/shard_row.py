"""A shard on its way through the stages.

It is one row of one block, its samples an Arrow table in IPC bytes: Ray Data splits and merges blocks of many rows as
it sees fit, and a shard must arrive whole where it is written.
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pcm.errors import InputError
from pcm.records import MAX_SHARD_BYTES

#: Errors that a shard's stats keep.
ERRORS_KEPT = 3

#: What travels between stages. large_binary: pictures and features of a shard together may exceed 2 GB.
SHARD_ROW_SCHEMA = pa.schema(
    [("shard", pa.int64()), ("payload", pa.large_binary()), ("stats", pa.string()), ("turn", pa.int64())]
)


@dataclass(frozen=True)
class ShardRow:
    """One shard on its way: number, samples, what the stages measured, and the turn in which it was drawn, if any."""

    shard: int
    samples: pa.Table
    stats: dict
    turn: int | None = None

    def to_block(self) -> pa.Table:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.samples.schema) as writer:
            writer.write_table(self.samples)
        payload = sink.getvalue()
        offsets = pa.py_buffer(np.array([0, payload.size], np.int64))
        columns = [
            pa.array([self.shard], pa.int64()),
            pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, payload]),  # no copy
            pa.array([json.dumps(self.stats)]),
            pa.array([self.turn], pa.int64()),
        ]
        return pa.Table.from_arrays(columns, schema=SHARD_ROW_SCHEMA)

    @staticmethod
    def from_block(block: pa.Table) -> "ShardRow":
        payload = block["payload"].combine_chunks()[0].as_buffer()
        with pa.ipc.open_stream(payload) as reader:
            samples = reader.read_all()
        shard, stats, turn = (block[name][0].as_py() for name in ("shard", "stats", "turn"))
        return ShardRow(shard, samples, json.loads(stats), turn)


def check_picture_bytes(num_bytes: int, shard: int, *, pictures: str = "pictures") -> None:
    """Raises InputError where the pictures of a shard have more bytes than it can hold."""
    if num_bytes > MAX_SHARD_BYTES:
        raise InputError(
            f"shard {shard}: its {pictures} have {num_bytes:,} bytes, at most {MAX_SHARD_BYTES:,} fit; "
            "give a smaller --shard-size and another --out"
        )


def picture_bytes(pictures: pa.ChunkedArray) -> int:
    return pc.sum(pc.binary_length(pictures).cast(pa.int64())).as_py() or 0
