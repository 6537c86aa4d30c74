"""Export to WebDataset in img2dataset's convention: a tar a shard, and its `_stats.json`.

    00000.tar          000000000.jpg 000000000.txt 000000000.json 000000001.jpg ...
    00000_stats.json   count, successes, failures by reason, times

A key is five digits of shard and four of row; quarantined samples leave a gap. Above 100,000 shards every shard of the
dataset has six digits or more, so that names sort as numbers do.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence

from cluster.export.source import Source
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.images import image_ending

LEAST_DIGITS = 5  # of a shard
MAX_ROWS = 10_000

_COLUMNS = ["sample_id", "caption", "image", "width", "height", "seed", "clip_score"]


class WebDataset:
    """cluster.export.source.Format."""

    def __init__(self, source: Source, out: Store) -> None:
        self._source = source
        self._out = out
        shards = source.num_shards if source.plan is None else source.plan.num_shards  # an unfinished one grows
        self._digits = max(LEAST_DIGITS, len(str(shards - 1)))

    def prepare(self) -> dict[str, bytes]:
        if (size := self._source.largest_shard) > MAX_ROWS:
            raise InputError(
                f"{self._source.store.root}: a shard of {size}; WebDataset keys have room for {MAX_ROWS:,} in each; "
                "export --to huggingface"
            )
        return {}

    def marker(self, shard: int) -> str:
        return f"{self._name(shard)}_stats.json"

    def write(self, shard: int) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            rows = self._source.read(shard, _COLUMNS).to_pylist()
            places = self._source.places(shard, [row["sample_id"] for row in rows])
            for place, row in zip(places, rows, strict=True):
                key = f"{self._name(shard)}{place:04d}"
                picture = row["image"]["bytes"]
                _add(tar, f"{key}.{image_ending(picture)}", picture)
                _add(tar, f"{key}.txt", row["caption"].encode())
                _add(tar, f"{key}.json", document_bytes(self._document(key, row, picture)))
        self._out.write_bytes(f"{self._name(shard)}.tar", buffer.getvalue())
        self._out.write_bytes(self.marker(shard), document_bytes(self._stats(shard)))

    def _name(self, shard: int) -> str:
        return f"{shard:0{self._digits}d}"

    def written(self, shard: int) -> None:
        pass

    def finish(self, shards: Sequence[None]) -> None:
        pass

    def tidy(self) -> None:
        pass

    def _document(self, key: str, row: dict, picture: bytes) -> dict:
        spec = self._source.manifest.spec
        return {
            "key": key,
            "caption": row["caption"],
            "status": "success",
            "error_message": None,
            "width": row["width"],
            "height": row["height"],
            "original_width": row["width"],
            "original_height": row["height"],
            "sha256": hashlib.sha256(picture).hexdigest(),
            "sample_id": row["sample_id"],
            "seed": row["seed"],
            "clip_score": row["clip_score"],
            "generator": spec.generator.model,
            "generator_revision": spec.generator.revision,
        }

    def _stats(self, shard: int) -> dict:
        stats = self._source.stats(shard)
        return {
            "count": stats["count"],
            "successes": stats["successes"],
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "failed_to_generate": stats["failed_to_generate"],
            "duration": stats["end_time"] - stats["start_time"],
            "start_time": stats["start_time"],
            "end_time": stats["end_time"],
            "status_dict": stats["status_dict"],
        }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # its time is 0 and its owner root: the same picture gives the same bytes
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
