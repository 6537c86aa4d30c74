"""Tables as Parquet objects: what decides their bytes, and what reading raises."""

import functools
import io

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.store.store import Store


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file in memory; the same table gives the same bytes with the same release of pyarrow,
    whose name stands in the footer.

    Pictures are compressed already and features are noise to a compressor: left as they are, they take a tenth more
    room, and Arrow reads the patch features by copying their bytes. The other columns win from zstd; level 1 costs
    nothing measurable.
    """
    buffer = io.BytesIO()
    compressed = [field.name for field in table.schema if not _is_noise(field.type)]
    pq.write_table(
        table,
        buffer,
        compression=dict.fromkeys(compressed, "zstd"),
        compression_level=dict.fromkeys(compressed, 1),
        use_dictionary=["caption", "status", "reason"] if "caption" in table.column_names else False,
        write_statistics=["sample_id"],
    )
    return buffer.getvalue()


def _is_noise(kind: pa.DataType) -> bool:
    """Pictures and features."""
    return pa.types.is_nested(kind) or pa.types.is_fixed_size_binary(kind)


#: What reading a damaged Parquet object raises: gone, no Parquet, broken pages, text that is no UTF-8, another schema.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, pa.ArrowException)


def read_table(store: Store, key: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read_bytes(key)), columns=columns)


def pyarrow_of(store: Store, key: str) -> str:
    """The release of pyarrow that wrote a Parquet object, by its footer. Raises what UNREADABLE has."""
    with store.open(key, buffered=False) as file:
        return _release(pq.read_metadata(file))


@functools.cache
def pyarrow_here() -> str:
    """What `pyarrow_of` says of an object that this process writes."""
    return _release(pq.read_metadata(io.BytesIO(parquet_bytes(pa.table({"sample_id": ["0"]})))))


def _release(metadata: pq.FileMetaData) -> str:
    """26.0.1 of "parquet-cpp-arrow version 26.0.1"."""
    return str(metadata.created_by).rpartition(" ")[2]
