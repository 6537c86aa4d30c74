"""The id, and the folder, that a row's picture has among published files."""

import itertools
import logging
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from cluster.dataset.documents import read_plan_part
from cluster.export.source import Source
from cluster.sources.pictures import candidate_ids
from pcm.generation.names import IMPORTED, PHOTOS
from pcm.official.files import FIRST_IMAGE_ID, split_of

log = logging.getLogger(__name__)

_IMPORTED_PATH = re.compile(r"(?:sp(?P<split>[0-9]+)/)?(?P<image_id>[^/]+)\.[a-z]+")


@dataclass(frozen=True)
class PublishedId:
    """split_id None: a real photo, whose features lie in the folder without _sp."""

    image_id: str
    split_id: int | None


class PublishedIds:
    """Of one dataset. Drawn pictures are numbered from 6000000 by their place in the plan, imported ones keep id and
    folder. Photos, and whatever `photo_of` knows by sample id, have the ids that `published_ids` gave them.
    """

    def __init__(self, source: Source, photo_of: Mapping[str, str], file_names: Mapping[str, str]) -> None:
        self._imported = source.manifest.spec.generator.model == IMPORTED
        self._photo_of = photo_of
        self.file_names = file_names  # of photos: image id -> the name that their captions know them by

    def of(self, sample_id: str, path: str | None, position: int) -> PublishedId:
        """Of a row; `path`: that of its picture; `position`: as cluster.export.source.Source.positions."""
        if sample_id in self._photo_of:
            return PublishedId(self._photo_of[sample_id], None)
        if self._imported and (match := _IMPORTED_PATH.fullmatch(path or "")):
            split = match["split"]
            return PublishedId(match["image_id"], None if split is None else int(split))
        return PublishedId(str(FIRST_IMAGE_ID + position), split_of(position))


def published_ids(data: Source, photos: Mapping[str, Source]) -> tuple[PublishedIds, dict[str, PublishedIds]]:
    """The ids of an export's datasets, so that no two pictures have one: of `data`, and of each of `photos` by stage.

    All photos lie in one folder, so they are numbered together. They keep their own numbers:
    COCO_val2014_000000391895.jpg is 391895. The published code reads ids as numbers: where a photo's name ends in
    none, or two have the same, all are numbered from 1, past the ids that imported pictures keep.
    """
    model = data.manifest.spec.generator.model
    of_data = _photos(data) if model == PHOTOS else {}
    of_stages = {stage: _photos(source) for stage, source in photos.items()}
    taken = {photo.name for photo in _photos(data).values()} if model == IMPORTED and photos else set()
    every = [photo for found in (of_data, *of_stages.values()) for photo in found.values()]
    numbers = _numbers(list(dict.fromkeys(every)), taken)

    def ids(source: Source, found: Mapping[str, _Photo]) -> PublishedIds:
        photo_of = {sample_id: numbers[photo] for sample_id, photo in found.items()}
        return PublishedIds(source, photo_of, {numbers[photo]: photo.name for photo in found.values()})

    return ids(data, of_data), {stage: ids(photos[stage], found) for stage, found in of_stages.items()}


@dataclass(frozen=True)
class _Photo:
    """origin: tells pictures of one name apart: the dataset's address or, where several may have been merged, the
    sha256 of the picture."""

    name: str
    origin: str


def _photos(source: Source) -> dict[str, _Photo]:
    """Sample id -> photo."""
    found: dict[str, _Photo] = {}
    plan = source.plan
    for shard in range(source.num_shards if plan is None else plan.num_shards):
        if plan is None:
            origins: Mapping[str, str] = source.picture_digests(shard)
            corpus_ids = source.corpus_ids(shard)
        else:
            columns = ["sample_id", "corpus_id"]
            planned = read_plan_part(source.store, plan.part_key(shard), columns).to_pylist()
            corpus_ids = {row["sample_id"]: row["corpus_id"] for row in planned}
            origins = dict.fromkeys(corpus_ids, source.store.address)
        for sample_id, corpus_id in corpus_ids.items():
            if plan is None or "#" in corpus_id:  # a planned caption without it names no photo, and has no picture
                found[sample_id] = _Photo(corpus_id.rpartition("#")[0] or corpus_id, origins[sample_id])
    return found


def _numbers(photos: Sequence[_Photo], taken: Container[str] = ()) -> dict[_Photo, str]:
    found = {
        photo: next((each for each in reversed(candidate_ids(photo.name)) if each.isdecimal()), "") for photo in photos
    }
    numbers = set(found.values())
    if "" not in numbers and len(numbers) == len(found) and not any(number in taken for number in numbers):
        return found
    log.info("photos are numbered from 1: %s", _why_not_their_own(found))
    free = (str(number) for number in itertools.count(1) if str(number) not in taken)
    return dict(zip(photos, free, strict=False))


def _why_not_their_own(numbers: Mapping[_Photo, str]) -> str:
    names: dict[str, str] = {}
    for photo, number in numbers.items():
        if not number:
            return f"the name {photo.name} does not end in a number, as that of COCO_val2014_000000391895.jpg does"
        if number in names:
            return f"{names[number]} and {photo.name} have the same number"
        names[number] = photo.name
    return "one has the number of an imported picture"
