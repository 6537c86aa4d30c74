"""What training asks of every row before its first step, of a thousand shards in one `progress/rows-000123.parquet`.

Whether a row is trained on or held out follows from its caption, its score and its weight
(cluster.training.data.selection). Of these the index holds a line a row: 8 bytes of the caption's sha256, the score,
the weight; 12 bytes at most. The driver of a generation writes it with the object of its group
(cluster.dataset.committed). Where there is none (older and derived datasets, a driver that died meanwhile), the first
training reads the captions of the group's shards, once, and stores it. It is bound to the shards by their checksums:
one that is damaged or of other shards is not believed, and made again.
"""

import base64
import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.documents import StoredShard
from cluster.dataset.keys import row_index_key
from cluster.dataset.rows import read_shard, scores_of
from cluster.store.store import Store
from pcm.errors import StoreFailure, first_line

log = logging.getLogger(__name__)

_SCHEMA = pa.schema([("caption", pa.uint64()), ("clip_score", pa.float32()), ("weight", pa.int32())])
#: Metadata of the object: which shards it is of.
_SHARDS = b"shards"


def caption_digests(captions: Iterable[str]) -> np.ndarray:
    """(n,) uint64 that depend on the words alone; letter case and spacing do not matter."""
    words = (" ".join(caption.lower().split()).encode("utf-8", "surrogatepass") for caption in captions)
    return np.frombuffer(b"".join(hashlib.sha256(each).digest()[:8] for each in words), ">u8").astype(np.uint64)


def index_text(captions: Sequence[str], clip_score: np.ndarray) -> str:
    """The index of one shard's rows, each of weight 1, as what a writer tells the driver."""
    parts = caption_digests(captions).astype("<u8").tobytes(), clip_score.astype("<f4").tobytes()
    return base64.b64encode(b"".join(parts)).decode()


def index_of_texts(texts: Iterable[str]) -> pa.Table:
    """The index of some shards from what `index_text` says of each."""
    digests, scores = [np.zeros(0, np.uint64)], [np.zeros(0, np.float32)]
    for text in texts:
        data = base64.b64decode(text)
        rows = len(data) // 12
        digests.append(np.frombuffer(data, "<u8", rows))
        scores.append(np.frombuffer(data, "<f4", rows, 8 * rows))
    return _index(np.concatenate(digests), np.concatenate(scores), np.ones(sum(map(len, scores)), np.int32))


def row_index(
    store: Store, group: int, shards: Sequence[StoredShard], pool: ThreadPoolExecutor, *, keep: bool = True
) -> pa.Table:
    """Columns caption (uint64, of `caption_digests`), clip_score and weight of all rows of a group's shards: a thousand
    that follow each other, cluster.dataset.committed.GROUP, or what there are.

    With `keep`, an index that had to be made is stored, for others and for later. Raises InputError as read_shard does.
    """
    if (found := _stored_index(store, group, shards)) is not None:
        return found
    log.info("%s/%s: is made from the captions of %d shards", store.root, row_index_key(group), len(shards))
    made = pa.concat_tables(pool.map(lambda shard: _index_of_shard(store, shard), shards)).combine_chunks()
    if keep:
        try:
            store_row_index(store, group, shards, made)
        except StoreFailure as error:  # a dataset may be there to read only
            log.info("the index is not kept: %s", error)
    return made


def store_row_index(store: Store, group: int, shards: Sequence[StoredShard], index: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(
        index.replace_schema_metadata({_SHARDS: _binding(shards)}),
        buffer,
        compression="none",  # digests are noise, and weights are nearly all the same
        use_dictionary=["weight"],
        write_statistics=False,
        write_page_checksum=True,
    )
    store.write_bytes(row_index_key(group), buffer.getvalue())


def _stored_index(store: Store, group: int, shards: Sequence[StoredShard]) -> pa.Table | None:
    try:
        data = store.read_bytes(row_index_key(group))
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        metadata = table.schema.metadata or {}
        if metadata.get(_SHARDS, b"").decode() != _binding(shards):
            return None
        table = table.replace_schema_metadata()
        if table.schema != _SCHEMA or any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid("other columns, or values are missing")
        if len(table) != sum(shard.rows for shard in shards):
            raise pa.ArrowInvalid(f"{len(table)} rows")
        return table
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        log.warning("%s/%s: damaged (%s); it is made again", store.root, row_index_key(group), first_line(error))
        return None


def _index_of_shard(store: Store, shard: StoredShard) -> pa.Table:
    columns = ["caption", "clip_score", *([] if shard.weighted_rows is None else ["weight"])]
    table = read_shard(store, shard, columns, checksum=False)  # compared when its features are read
    weight = table["weight"].to_numpy() if shard.weighted_rows is not None else np.ones(len(table))
    return _index(caption_digests(table["caption"].to_pylist()), scores_of(store, shard, table), weight)


def _index(digests: np.ndarray, clip_score: np.ndarray, weight: np.ndarray) -> pa.Table:
    return pa.table([digests, clip_score, weight.astype(np.int32)], schema=_SCHEMA)


def _binding(shards: Sequence[StoredShard]) -> str:
    """A digest of the very shards whose rows these are."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.key} {shard.rows} {shard.sha256}\n".encode())
    return digest.hexdigest()
