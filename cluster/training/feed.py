"""The rows of a run as one worker sees them: finished datasets, or one whose first epoch begins while it is made."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from cluster.dataset.documents import Plan, load_manifest, load_plan
from cluster.store.store import Store, open_store
from cluster.training.config import TrainConfig
from cluster.training.data.arriving import ArrivingShards, finished_manifest
from cluster.training.data.batches import Batch, BatchShape
from cluster.training.data.mixture import TrainingSet, is_known_by, open_training_sets
from cluster.training.data.selection import Ranks, RowFilter, Selection, holdout_share, select_rows
from cluster.training.data.shard_cache import ShardCache
from cluster.training.data.shuffled import Part, ShardLoader
from cluster.training.run_spec import RunSpec
from cluster.training.validation import LEAST_CAPTIONS, LEAST_PICTURES, ValidationShare, held_out_share, picture_share
from cluster.weights.node_copy import local_name
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.text.vocabulary import Vocabulary


class DataChanged(InputError):
    """The data is not what a run began on: no other try helps, nor another trial of the same sweep."""


class PicturesUnfit(InputError):
    """No best epoch can be chosen by the validation pictures: no other try helps, nor another trial."""


class TrainingData:
    """Batches of any epoch, and the validation share. `open` comes before all else, but for a first epoch in the order
    of the plan, which takes shards as they are committed.
    """

    def __init__(self, run: RunSpec, shape: BatchShape, vocabulary: Vocabulary, *, device: torch.device) -> None:
        self._run, self._shape, self._vocabulary, self._device = run, shape, vocabulary, device
        #: Of data whose first epoch is in its order.
        self.plan = self._load_plan() if run.config.first_epoch == "plan" else None
        self._loader: ShardLoader | None = None
        #: Of such data, once it is open: sha256 of its shards. The plan, by which the run knows it, stays the same when
        #: shards are made again.
        self.rows_digest = ""
        self._validation: Future[ValidationShare] | None = None

    def open(self) -> str:
        """Loader and validation set of the finished data, which is waited for where it is still being made; says in
        words what there is. Held-out pairs are read meanwhile. Raises InputError when there is nothing to train on,
        and where the data is not what config.json says.
        """
        run, place = self._run, {"rank": self._shape.rank, "num_workers": self._shape.num_workers}
        if self.plan is not None:
            self._load_plan()  # of one that has changed the manifest would be waited for without end
            finished_manifest(open_store(run.data[0].uri), self.plan)
        sets = open_training_sets(run.data)
        for each, recorded in zip(sets, run.document["datasets"], strict=True):
            planned = self.plan is not None
            if each.pinned is None and not is_known_by(each.store, recorded["sha256"], planned=planned):
                raise _changed(each.store)
        manifest = sets[0].manifest
        if self.plan is not None:
            shards = "".join(shard["sha256"] for shard in manifest.shards)
            self.rows_digest = hashlib.sha256(shards.encode()).hexdigest()
        stored = sum(each.manifest.stored for each in sets)
        row_filter = self._row_filter(self.plan.usable if self.plan else stored)
        ranks = Ranks(**place, gather=self._gather)
        training, held_out = _select(sets, row_filter, ranks)
        if run.validation is None:
            count = _check_held_out(held_out, stored=stored, config=run.config)
            pairs = [(each.store, rows) for each, rows in zip(sets, held_out, strict=True)]
            # While the first epoch trains: of a large dataset they lie in up to a thousand shards.
            reader = ThreadPoolExecutor(1, "held-out")
            self._validation = reader.submit(held_out_share, pairs, manifest.features, **place)
            reader.shutdown(wait=False)
            source = f"{count} held-out synthetic pairs"
        else:
            clip = manifest.spec.clip
            clip_place = local_name(run.clip, clip.revision)
            encoder = ClipEncoder.from_spec(clip, model=clip_place, device=str(self._device))
            share = picture_share(run.validation, encoder, **place)
            self._check_pictures(share, run.validation.images)
            self._validation = Future()
            self._validation.set_result(share)
            source = run.validation.images
        self._loader = ShardLoader(
            [
                Part(each.store, rows, each.weight, self._shard_cache(each))
                for each, rows in zip(sets, training, strict=True)
            ],
            self._shape,
            self._vocabulary,
            seed=run.config.seed,
            cache_bytes=run.cache_bytes,
            window_bytes=run.window_bytes,
        )
        return (
            f"training on {sum(map(len, training))} of {stored} pairs, {self._loader.rows_per_epoch} rows and "
            f"{self._loader.steps_per_epoch} steps an epoch, {run.config.epochs} epochs; validation on {source}"
        )

    @property
    def is_open(self) -> bool:
        return self._loader is not None

    @property
    def validation(self) -> ValidationShare:
        """Waited for, if it is still being read. Raises InputError as `held_out_share` does."""
        assert self._validation is not None, "open() makes it"
        return self._validation.result()

    def steps_per_epoch(self) -> int:
        """Exact, but for a first epoch whose rows are not all there: then as many as are planned."""
        if self._loader is not None:
            return self._loader.steps_per_epoch
        assert self.plan is not None, "open() comes first"
        row_filter = self._row_filter(self.plan.usable)
        rows = self.plan.usable * (1 - row_filter.held_out) * row_filter.fraction
        return max(1, round(rows / self._shape.batch_size))

    def batches(self, epoch: int, *, start_step: int) -> Iterator[Batch]:
        """Of one epoch, this worker's. Raises InputError for held-out pairs that cannot be used as soon as they are
        read, not at the end of the first epoch."""
        for batch in self._batches(epoch, start_step=start_step):
            if self._validation is not None and self._validation.done():
                self._validation.result()
            yield batch

    def _batches(self, epoch: int, *, start_step: int) -> Iterator[Batch]:
        if epoch > 0 or self.plan is None:
            assert self._loader is not None, "open() comes first"
            return self._loader.epoch(epoch, start_step=start_step)
        arriving = ArrivingShards(
            open_store(self._run.data[0].uri),
            self.plan,
            self._row_filter(self.plan.usable),
            self._shape,
            self._vocabulary,
            seed=self._run.config.seed,
        )
        return arriving.batches(start_step=start_step)

    def _check_pictures(self, share: ValidationShare, images: str) -> None:
        """Raises PicturesUnfit, on every worker, where fewer pictures can be read than the best epoch is chosen by, or
        where all have the same references."""
        different = list({frozenset(texts) for texts in share.references.values()})[:LEAST_CAPTIONS]
        shares = self._gather((len(share.references), share.unreadable, different))
        count = sum(readable for readable, *_ in shares)
        if count < LEAST_PICTURES:
            why = next((line for _, unreadable, _ in shares for line in unreadable.values()), "it has no others")
            raise PicturesUnfit(
                f"--val-images {images}: {count or 'none'} of its pictures can be read, where {LEAST_PICTURES} are "
                f"needed to choose the best epoch ({why}); give more pictures with references"
            )
        if len({texts for *_, some in shares for texts in some}) < LEAST_CAPTIONS:
            raise PicturesUnfit(
                f"--val-images {images}: all {count} pictures have the same references, and their CIDEr is 0 whatever "
                "a model says; give pictures with references of their own"
            )

    def _gather(self, value: Any) -> list[Any]:
        """What every worker says, in the order of their ranks."""
        said = [value] * self._shape.num_workers
        if self._shape.num_workers > 1:
            torch.distributed.all_gather_object(said, value)
        return said

    def _load_plan(self) -> Plan:
        """Raises InputError where it is of other captions than the run began on."""
        store, recorded = open_store(self._run.data[0].uri), self._run.document["datasets"][0]["sha256"]
        plan = load_plan(store)
        assert plan is not None, "the driver read it"
        if not is_known_by(store, recorded, planned=True):
            raise _changed(store)
        of_manifest = is_known_by(store, recorded, planned=False)
        if of_manifest and load_manifest(store).corpus_fingerprint != plan.corpus_fingerprint:
            raise _changed(store)  # the corpus grows, and its manifest is still that of before
        return plan

    def _row_filter(self, rows: int) -> RowFilter:
        """`rows` of the data, planned ones where they are not yet made."""
        return _row_filter(self._run.config, rows, hold_out=self._run.validation is None)

    def _shard_cache(self, training_set: TrainingSet) -> ShardCache | None:
        if self._run.cache_dir is None:
            return None
        name = training_set.description()["sha256"][:16] + ("-int8" if self._shape.int8 else "")
        return ShardCache(Path(self._run.cache_dir) / name, int8=self._shape.int8)


def check_hold_out(config: TrainConfig, sets: Sequence[TrainingSet]) -> None:
    """Raises InputError where a run with these settings, which is finished data's, would hold out too few pairs."""
    stored = sum(each.manifest.stored for each in sets)
    _, held_out = _select(sets, _row_filter(config, stored, hold_out=True), Ranks())
    _check_held_out(held_out, stored=stored, config=config)


def _row_filter(config: TrainConfig, rows: int, *, hold_out: bool) -> RowFilter:
    share = holdout_share(fraction=config.holdout_fraction, limit=config.holdout_limit, rows=rows)
    return RowFilter(
        seed=config.seed,
        held_out=share if hold_out else 0.0,
        fraction=config.fraction,
        min_clip_score=config.min_clip_score,
    )


def _select(
    sets: Sequence[TrainingSet], row_filter: RowFilter, ranks: Ranks
) -> tuple[tuple[Selection, ...], tuple[Selection, ...]]:
    """The training rows of each dataset, and the held-out ones."""
    training, held_out = zip(
        *(
            select_rows(each.store, each.shards, row_filter, ranks=ranks, keep_index=each.pinned is None)
            for each in sets
        ),
        strict=True,
    )
    return training, held_out


def _check_held_out(held_out: Sequence[Selection], *, stored: int, config: TrainConfig) -> int:
    """How many pairs are held out. Raises InputError where they are too few to choose the best epoch on."""
    count = sum(map(len, held_out))
    if count < LEAST_PICTURES:
        raise InputError(
            f"validation: of {stored} pairs, holdout_fraction={config.holdout_fraction:g} leaves "
            f"{count or 'none'} to choose the best epoch on, where {LEAST_PICTURES} are needed; give "
            "--val-images, or --set holdout_fraction=0.5, more pairs or another --seed"
        )
    if len(frozenset().union(*(each.captions for each in held_out))) < LEAST_CAPTIONS:
        raise InputError(
            f"validation: all {count} pairs that holdout_fraction={config.holdout_fraction:g} leaves to "
            "choose the best epoch on are of one caption, and their CIDEr is 0 whatever a model says; give "
            "--val-images, or --set holdout_fraction=0.5, more captions or another --seed"
        )
    return count


def _changed(store: Store) -> DataChanged:
    return DataChanged(
        f"{store.root}: has changed since this run began (its corpus grew, or shards were made again); train into "
        "another --out"
    )
