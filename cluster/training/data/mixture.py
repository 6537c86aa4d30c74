"""Several datasets as one training set: what --data says, and that each can be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dataset.documents import Manifest, Plan, StoredShard
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, VOCABULARY_KEYS
from cluster.dataset.opened import open_dataset
from cluster.dataset.state import state_digest
from cluster.dataset.together import check_same_clip
from cluster.dataset.vocabulary_files import check_vocabularies, made_again
from cluster.store.store import Store, open_store
from cluster.training.request import DataSource
from pcm.errors import InputError
from pcm.records import FeatureShape


@dataclass(frozen=True)
class TrainingSet:
    """A dataset and its weight."""

    store: Store
    manifest: Manifest
    weight: float
    #: The document whose digest says which rows these are.
    defined_by: str = MANIFEST_KEY
    #: Of an unfinished dataset: the manifest of the shards that were there, for all workers the same.
    pinned: bytes | None = None
    #: Of the same, "31 of 2,215 shards", where the driver found them.
    extent: str = ""

    @property
    def shards(self) -> Sequence[StoredShard]:
        return self.manifest.stored_shards

    def description(self) -> dict:
        """For config.json: what decides the rows."""
        document = self.pinned or self.store.read_bytes(self.defined_by)
        found = {"path": self.store.root, "sha256": state_digest(document), "weight": self.weight}
        return found if self.pinned is None else {**found, "unfinished_shards": len(self.manifest.shards)}


def open_training_sets(sources: Sequence[DataSource], *, unfinished: bool = False) -> tuple[TrainingSet, ...]:
    """The datasets of --data; with `unfinished` whatever shards are there now of those that are being made.

    Raises InputError unless each is finished, not empty and of the first one's features.
    """
    if not sources:
        raise InputError("--data: give at least one dataset")
    sets = []
    for source in sources:
        store = open_store(source.uri)
        found = _opened(store, source, unfinished=unfinished)
        manifest = found.manifest
        if not manifest.stored:
            raise InputError(f"{store.root}: holds no stored pair; generate a dataset with some first")
        for key in VOCABULARY_KEYS:
            if not store.exists(key):
                more = (
                    " (a dataset of the null generator has no features)"
                    if manifest.spec.clip.model == "null"
                    else made_again(store, manifest, key)
                )
                raise InputError(f"{store.root}: has no {key}; it cannot be trained on{more}")
        check_vocabularies(store)
        sets.append(found)
    if len({training_set.store.prefix for training_set in sets}) < len(sets):
        raise InputError(f"--data {' '.join(source.uri for source in sources)}: a dataset twice; give it a weight")
    check_same_clip(sets)
    return tuple(sets)


def _opened(store: Store, source: DataSource, *, unfinished: bool) -> TrainingSet:
    if source.manifest is not None:
        return TrainingSet(store, Manifest.from_json(source.manifest), source.weight, pinned=source.manifest)
    found = open_dataset(store, unfinished=unfinished)
    pinned = found.manifest.to_json() if found.is_unfinished else None
    return TrainingSet(store, found.manifest, source.weight, pinned=pinned, extent=found.extent)


def is_known_by(store: Store, sha256: str, *, planned: bool) -> bool:
    """Whether `sha256`, by which config.json knows a dataset, is of what lies there now: its manifest. Of a run whose
    first epoch is in the order of the plan (`planned`) it may be of the plan, as where jobs.stream began it.
    """
    keys = (MANIFEST_KEY, PLAN_KEY) if planned else (MANIFEST_KEY,)
    return any(store.exists(key) and state_digest(store.read_bytes(key)) == sha256 for key in keys)


def arriving_set(store: Store, plan: Plan, features: FeatureShape) -> TrainingSet:
    """A dataset that is being made, as its plan describes it: no shards yet, and whatever is planned will be stored."""
    manifest = Manifest(
        spec=plan.spec,
        corpus=plan.corpus,
        corpus_fingerprint=plan.corpus_fingerprint,
        features=features,
        expected=plan.expected,
        stored=plan.usable,
        quarantined=plan.expected - plan.usable,
        quarantined_by_reason={},
        clip_score_mean=None,
        shard_bytes=0,
        shards=(),
        schema_version=plan.schema_version,
    )
    return TrainingSet(store, manifest, 1.0, defined_by=PLAN_KEY)
