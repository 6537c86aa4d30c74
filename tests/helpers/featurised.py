"""jobs.featurise --data in this process, without Ray."""

from pathlib import Path

import pyarrow as pa

from cluster.dataset.derived import claim
from cluster.dataset.documents import Manifest
from cluster.dataset.opened import open_dataset
from cluster.generation.pinning import clip_spec
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.ingest.another_clip import (
    begun_clip,
    finish,
    keep_spec,
    lineage_of,
    missing_shards,
    store_vocabularies_of,
)
from cluster.ingest.featurise_again import WORK, ReadPictures, WriteFeaturised
from cluster.ingest.request import FeaturiseRequest
from cluster.store.store import Store, open_store


class FailsOnOne(FeaturiseShard):
    """A CLIP that raises on every batch with the picture of one sample in it."""

    def encode_rows(self, drawn: pa.Table, rows: list[int]):  # type: ignore[no-untyped-def]
        if any(drawn["sample_id"][row].as_py() == "000000009-00" for row in rows):
            raise ValueError("this picture")
        return super().encode_rows(drawn, rows)


def featurise_in_process(
    data: Path,
    out: Path,
    clip: Path | str,
    *,
    shards: int | None = None,
    featurise: type[FeaturiseShard] = FeaturiseShard,
    clean: bool = False,
) -> Manifest | None:
    """The job's stages one after the other; with `shards` only so many of those that are missing, and no manifest. With
    `clean` the work is deleted in the end, as the job does."""
    request = FeaturiseRequest(data=str(data), out=str(out), clip=str(clip))
    source, store = open_dataset(open_store(data)), open_store(out)
    lineage = lineage_of(source, request, None, begun=begun_clip(store))
    if (found := claim(store, lineage)) is not None:
        return _cleaned(store, found) if clean else found
    spec = clip_spec(str(clip), device="cpu", dtype="float32", begun=begun_clip(store))
    keep_spec(store, spec)
    read, score, write = ReadPictures(source), featurise(spec), WriteFeaturised(store)
    for number in missing_shards(source, store)[:shards]:
        write(score(read(pa.table({"shard": [number]}))))
    if shards is not None:
        return None
    store_vocabularies_of(source.store, store, spec, None)
    made = finish(source, store, spec, lineage)
    return _cleaned(store, made) if clean else made


def _cleaned(store: Store, made: Manifest) -> Manifest:
    for key in store.list(f"{WORK}/"):
        store.delete(key)
    return made
