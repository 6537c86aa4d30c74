"""CLIP features that are there already, in place of pictures: published `.npz` files, or one of our datasets.

With them a captioner is evaluated, and captions are made, without a photo and without a CLIP.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.opened import open_dataset, read_corpus_ids
from cluster.dataset.rows import read_rows, read_shard
from cluster.sources.picture_source import FeatureSource
from cluster.sources.pictures import EncodedPictures, candidate_ids, picture_references, reference_names
from cluster.store.store import Store, open_store
from pcm.clip.encoder import ImageFeatures
from pcm.errors import InputError
from pcm.generation.names import UNDRAWN
from pcm.official.files import UNUSABLE_FEATURES, features_from_npz
from pcm.records import FeatureShape
from pcm.spec import ClipSpec
from pcm.text.references import References

log = logging.getLogger(__name__)

FEATURES_ENDING = ".npz"


@dataclass(frozen=True)
class GivenFeatures:
    """Features as they lie at a place: names, and `read(positions)`, (global (D,), patches (N, D_v)) of each, or the
    line that says why there are none.

    captions: name -> captions, where the place knows them. clip: that of a dataset.
    """

    place: str
    names: Sequence[str]
    read: Callable[[Sequence[int]], list[tuple[np.ndarray, np.ndarray] | str]]
    captions: dict[str, list[str]] = field(default_factory=dict)
    clip: ClipSpec | None = None


@dataclass(frozen=True)
class FeatureSet:
    """Pictures of which features are there, by image id; as cluster.sources.pictures.PictureSet."""

    image_ids: tuple[str, ...]
    references: dict[str, list[str]]
    given: GivenFeatures
    positions: tuple[int, ...]  # of the image ids among the given features
    without_references: int = 0
    without_picture: int = 0
    bad_references: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def encoded(self, numbers: Sequence[int], shape: FeatureShape) -> EncodedPictures:
        """The features of some image ids; those that cannot be read, or are not of this shape, are named."""
        image_ids, images, patches = [], [], []
        unreadable: dict[str, str] = {}
        for number, found in zip(numbers, self.given.read([self.positions[n] for n in numbers]), strict=True):
            image_id = self.image_ids[number]
            reason = found if isinstance(found, str) else _other_shape(*found, shape)
            if reason or isinstance(found, str):
                log.warning("left out: %s: %s", image_id, reason)
                unreadable[image_id] = f"{image_id}: {reason}"
                continue
            image_ids.append(image_id)
            images.append(found[0])
            patches.append(found[1])
        features = ImageFeatures(
            np.array(images, np.float32).reshape(-1, shape.embed_dim),
            np.array(patches, np.float32).reshape(-1, shape.num_patches, shape.patch_dim),
        )
        return EncodedPictures(tuple(image_ids), features, unreadable)


def _other_shape(image: np.ndarray, patches: np.ndarray, shape: FeatureShape) -> str:
    if image.shape == (shape.embed_dim,) and patches.shape == (shape.num_patches, shape.patch_dim):
        return ""
    return (
        f"features (D), (N, D_v) of shape {image.shape}, {patches.shape}; the captioner takes ({shape.embed_dim},), "
        f"{(shape.num_patches, shape.patch_dim)}: give features of the CLIP that it was trained with"
    )


def all_features(uri: str, *, limit: int | None = None) -> FeatureSet:
    """Whatever features lie at a place, without references. Raises InputError when there are none."""
    given = find_features(uri)
    count = len(given.names[:limit])
    return FeatureSet(tuple(given.names[:count]), {}, given, tuple(range(count)))


def load_feature_set(source: FeatureSource, *, limit: int | None = None) -> FeatureSet:
    """The features that have references, the first `limit` of them: by image id or, of a dataset, in its order.

    Raises InputError when there are no features, no references, or none of the features has references.
    """
    given = find_features(source.images)
    found = _references(source, given)
    references = found.by_image
    matched = _match(given, references)
    if not matched:
        raise InputError(
            f"--features {given.place}: none of its {len(given.names)} features (such as {given.names[0]!r}) is among "
            f"the {len(references)} image ids of the references (such as {next(iter(references))!r}); check "
            "--references and --split"
        )
    in_order = sorted(matched, key=matched.__getitem__) if given.clip is not None else sorted(matched)
    image_ids = tuple(in_order[:limit])
    return FeatureSet(
        image_ids=image_ids,
        references={image_id: references[image_id] for image_id in image_ids},
        given=given,
        positions=tuple(matched[image_id] for image_id in image_ids),
        without_references=len(given.names) - len(matched),
        without_picture=len(references) - len(matched),
        bad_references=found.left_out.total(),
    )


def _match(given: GivenFeatures, references: Mapping[str, object]) -> dict[str, int]:
    """Image id of the references -> position of its features: 1000092795.npz are those of 1000092795.jpg.

    Raises InputError when two features have one image id.
    """
    ids = reference_names(references)
    matched: dict[str, int] = {}
    for position, name in enumerate(given.names):
        image_id = next((ids[each] for each in candidate_ids(name) if each in ids), None)
        if image_id in matched:
            raise InputError(
                f"--features {given.place}: two features for image id {image_id!r} ({given.names[matched[image_id]]}, "
                f"{name}); keep one"
            )
        if image_id is not None:
            matched[image_id] = position
    return matched


def _references(source: FeatureSource, given: GivenFeatures) -> References:
    if source.references is not None:
        return picture_references(source)
    if not given.captions:
        raise InputError("--references is missing: files of features hold none")
    return References(dict(given.captions), Counter())


def find_features(uri: str) -> GivenFeatures:
    """The features at a place. Raises InputError when there are none."""
    store = open_store(uri)
    if store.exists(MANIFEST_KEY):
        return _of_dataset(store)
    names = sorted(key for key in store.list() if key.endswith(FEATURES_ENDING))
    if not names:
        raise InputError(
            f"--features {uri}: holds neither IMAGE_ID{FEATURES_ENDING} files nor a dataset ({MANIFEST_KEY}); give one "
            "of the two"
        )

    def read_one(name: str) -> tuple[np.ndarray, np.ndarray] | str:
        try:
            patches, image = features_from_npz(store.read_bytes(name))
        except (InputError, FileNotFoundError, IsADirectoryError) as error:
            return str(error) or type(error).__name__
        return image, patches

    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    return GivenFeatures(uri, stems, lambda positions: [read_one(names[position]) for position in positions])


def _of_dataset(store: Store) -> GivenFeatures:
    """The first row of each picture. Photos and imported pictures have their image ids, drawn ones their sample ids."""
    source = open_dataset(store, offer=False)
    manifest, undrawn = source.manifest, source.manifest.spec.generator.model in UNDRAWN
    places: list[tuple[int, int]] = []
    captions: dict[str, list[str]] = {}
    shards = manifest.stored_shards
    for shard, stored in enumerate(shards):
        table = read_shard(store, stored, ["sample_id", "caption"], checksum=False)  # when its features are read
        image_ids = table["sample_id"].to_pylist()
        if undrawn and (source.plan is not None or manifest.lineage is not None):
            named = [corpus_id.rpartition("#")[0] for corpus_id in read_corpus_ids(source, shard)]
            image_ids = [name or sample_id for name, sample_id in zip(named, image_ids, strict=True)]
        for row, (image_id, caption) in enumerate(zip(image_ids, table["caption"].to_pylist(), strict=True)):
            if image_id not in captions:
                places.append((shard, row))
            captions.setdefault(image_id, []).append(caption)
    if not places:
        raise InputError(f"--features {store.root}: the dataset holds no stored pair")

    def read(positions: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray] | str]:
        found: dict[int, tuple[np.ndarray, np.ndarray] | str] = {}
        by_shard: dict[int, list[int]] = {}
        for position in positions:
            by_shard.setdefault(places[position][0], []).append(position)
        for shard, some in by_shard.items():
            some = sorted(some, key=lambda position: places[position][1])
            numbers = np.array([places[position][1] for position in some])
            rows = read_rows(store, shards[shard], numbers, manifest.features)
            for position, image, patches in zip(some, rows.global_feature, rows.patch_features, strict=True):
                usable = np.isfinite(image).all() and np.isfinite(patches).all() and image.any()
                found[position] = (image, patches) if usable else UNUSABLE_FEATURES
        return [found[position] for position in positions]

    return GivenFeatures(store.root, list(captions), read, captions, manifest.spec.clip)
