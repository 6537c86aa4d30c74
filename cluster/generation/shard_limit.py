"""Shards that a plan has no numbers for, told before planning: a hundred million captions are planned for a quarter of
an hour before the last number is used up."""

import logging
from collections.abc import Callable, Iterable

from cluster.dataset import plan
from cluster.sources.corpus import corpus_bytes

log = logging.getLogger(__name__)

#: A record of a corpus has more bytes than this, but for very short captions: those are told while they are planned.
LEAST_BYTES, LEAST_BYTES_PACKED = 24, 8  # the second of gzip and Parquet
_PACKED = (".gz", ".parquet")


def least_shard_size(
    uri: str, read: Callable[[], Iterable[object]], *, shard_size: int, images_per_caption: int, limit: int | None
) -> int:
    """`shard_size`, or the least larger one with which the corpus has no more shards than a plan has numbers for.

    `read` gives its records, at most `limit`. They are counted only where the bytes of the corpus leave it open.
    """
    room = plan.MAX_SHARDS * shard_size // images_per_caption  # records
    if limit is not None and limit <= room:
        return shard_size
    size = corpus_bytes(uri)
    if size is not None and size <= room * (LEAST_BYTES_PACKED if uri.endswith(_PACKED) else LEAST_BYTES):
        return shard_size
    log.info("%s: counting its captions, which may be too many for shards of %d", uri, shard_size)
    records = sum(1 for _ in read())
    return max(shard_size, -(-records * images_per_caption // plan.MAX_SHARDS))
