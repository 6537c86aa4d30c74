"""The id, and the folder, that a row's picture has among published files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.dataset.layout import read_plan_part
from cluster.export.source import Source
from cluster.sources.pictures import candidate_ids
from pcm.generation.names import IMPORTED, PHOTOS
from pcm.official.files import FIRST_IMAGE_ID, split_of

_IMPORTED_PATH = re.compile(r"(?:sp(?P<split>[0-9]+)/)?(?P<image_id>[^/]+)\.[a-z]+")


@dataclass(frozen=True)
class PublishedId:
    """split_id None: a real photo, whose features lie in the folder without _sp."""

    image_id: str
    split_id: int | None


class PublishedIds:
    """Drawn pictures are numbered from 6000000 by their place in the plan, imported ones keep id and folder, photos
    their own number: COCO_val2014_000000391895.jpg is 391895. The published code reads ids as numbers: where a photo's
    name holds none, or two have the same, the dataset's photos are numbered from 1.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.are_photos = source.manifest.spec.generator.model == PHOTOS
        self._imported = source.manifest.spec.generator.model == IMPORTED
        self.file_names: dict[str, str] = {}  # of photos: image id -> the name that their captions know them by
        self._photo_of: Mapping[str, str] = {}
        if self.are_photos:
            self._photo_of = self._photos()

    def of(self, sample_id: str, path: str | None, position: int) -> PublishedId:
        """Of a row; `path`: that of its picture; `position`: as cluster.export.source.Source.positions."""
        if self.are_photos:
            return PublishedId(self._photo_of[sample_id], None)
        if self._imported and (match := _IMPORTED_PATH.fullmatch(path or "")):
            split = match["split"]
            return PublishedId(match["image_id"], None if split is None else int(split))
        return PublishedId(str(FIRST_IMAGE_ID + position), split_of(position))

    def _photos(self) -> dict[str, str]:
        """Sample id -> image id."""
        names: dict[str, str] = {}
        plan = self._source.plan
        for shard in range(self._source.num_shards if plan is None else plan.num_shards):
            if plan is None:
                corpus_ids = self._source.corpus_ids(shard)
            else:
                columns = ["sample_id", "corpus_id"]
                planned = read_plan_part(self._source.store, plan.part_key(shard), columns).to_pylist()
                corpus_ids = {row["sample_id"]: row["corpus_id"] for row in planned}
            names |= {sample_id: corpus_id.rpartition("#")[0] for sample_id, corpus_id in corpus_ids.items()}
        numbers = _numbers(list(dict.fromkeys(names.values())))
        self.file_names = {number: name for name, number in numbers.items()}
        return {sample_id: numbers[name] for sample_id, name in names.items()}


def _numbers(names: Sequence[str]) -> dict[str, str]:
    found = {name: next((each for each in reversed(candidate_ids(name)) if each.isdecimal()), "") for name in names}
    if all(found.values()) and len(set(found.values())) == len(names):
        return found
    return {name: str(number) for number, name in enumerate(names, start=1)}
