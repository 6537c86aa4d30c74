"""First stage: captions to pictures."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.dataset.documents import read_plan_part
from cluster.dataset.environment import DRAWN_IN, environment, store_environment
from cluster.dataset.keys import shard_key
from cluster.dataset.plan import sample_id
from cluster.generation.picture_spec import refuse_other_models
from cluster.generation.retrying import RETRIED_BY, Retry
from cluster.generation.stages.merge import to_retry
from cluster.generation.stages.shard_row import ShardRow, check_picture_bytes, picture_bytes
from cluster.gpu_share import keep_to_gpu_share
from cluster.releases import check_releases
from cluster.store.retries import load_with_retries
from cluster.store.store import Store
from cluster.weights.node_copy import local_generator
from pcm.generation.drawing import UNGUARDED, Drawing, Request, TextToImage
from pcm.generation.loading import load_generator
from pcm.reasons import USABLE
from pcm.spec import DatasetSpec, GeneratorSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.generation.limits import FaultPolicy
    from cluster.generation.stages.guard import RunGuard


class DrawShard:
    """Generator pool: plan part in, drawings (or the reasons why there are none) out.

    With a monitor (and the run's policy) the drawing is watched; the null generator has nothing to watch. With
    `retry`, of a shard that is on the store only the samples quarantined for one of its reasons are drawn.
    """

    def __init__(
        self,
        store: Store,
        spec: DatasetSpec,
        watched_by: "tuple[ActorHandle, FaultPolicy] | None" = None,
        retry: Retry | None = None,
    ) -> None:
        self._store = store
        self._spec = spec
        self._retry = retry
        check_releases()
        keep_to_gpu_share(spec.generator.device)
        # Before the model is loaded, because a process may die of that too.
        self._guard = _run_guard(*watched_by, spec.generator) if watched_by and spec.generator.model != "null" else None
        self._generator = load_with_retries(self._load_pinned, model=spec.generator.model)
        self._environment = ""  # its digest, once this process has said where it draws

    def _load_pinned(self) -> TextToImage:
        refuse_other_models(self._spec)
        return self.load(self._spec.generator)

    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        """The model; a subclass may bring its own."""
        return load_generator(local_generator(spec))

    def __call__(self, block: pa.Table) -> pa.Table:
        shard = block["shard"][0].as_py()
        started = time.time()
        if self._guard:
            self._guard.begin_shard(shard)
        planned = read_plan_part(self._store, block["part"][0].as_py())
        retry = self._retry if self._retry and self._store.exists(shard_key(shard)) else None
        drawn = self.draw(to_retry(self._store, shard, planned, retry.reasons) if retry else planned)
        if self._guard:
            self._guard.end_shard(None if retry else drawn)
        if not self._environment:  # a machine that has drawn nothing is no part of the dataset
            generator = self._spec.generator
            found = environment(device=generator.device, loads_models=generator.model != "null")
            self._environment = store_environment(self._store, found)
        check_picture_bytes(picture_bytes(drawn["image"]), shard)  # before they are scored
        stats: dict = {"start_time": started, "draw_seconds": time.time() - started}
        if retry:
            stats |= {"retry": sorted(retry.reasons), RETRIED_BY: retry.id}
        turn = block["turn"][0].as_py() if "turn" in block.column_names else None
        return ShardRow(shard, drawn, stats | self._faults_seen(), turn).to_block()

    def _faults_seen(self) -> dict:
        per_caption = self._spec.images_per_caption
        errors = [
            {"sample_id": sample_id(*divmod(position, per_caption)), "error": error}
            for position, error in (self._guard.errors if self._guard else [])
        ]
        return {"errors": errors, "device_name": self._generator.device_name, DRAWN_IN: self._environment}

    def draw(self, plan: pa.Table) -> pa.Table:
        """The plan's rows with columns image (bytes), width, height, attempts, and their final seed and reason.

        Rows may come with `attempts` made before: the next seeds are tried.
        """
        reasons, seeds = plan["reason"].to_pylist(), plan["seed"].to_pylist()
        usable = [reason in USABLE for reason in reasons]
        wanted = [request for request, ok in zip(self._requests(plan), usable, strict=True) if ok]
        drawn = iter(self._generator.draw(wanted, self._guard or UNGUARDED))
        none = Drawing(b"", 0, 0, 0, 0, 0)
        drawings = [next(drawn) if ok else none for ok in usable]
        columns = {name: plan[name] for name in ("sample_id", "corpus_id", "caption")}
        columns |= {name: [getattr(drawing, name) for drawing in drawings] for name in _OF_DRAWING}
        columns["seed"] = [
            drawing.seed if drawing.attempts else seed for drawing, seed in zip(drawings, seeds, strict=True)
        ]
        columns["reason"] = [drawing.reason or reason for drawing, reason in zip(drawings, reasons, strict=True)]
        return pa.table(columns, schema=DRAWN_SCHEMA)

    def _requests(self, plan: pa.Table) -> Iterator[Request]:
        names = ["record_index", "image_index", "caption", "seed"]
        columns = [plan[name].to_pylist() for name in names]
        attempts = plan["attempts"].to_pylist() if "attempts" in plan.column_names else [0] * len(plan)
        for record, image, caption, seed, tried in zip(*columns, attempts, strict=True):
            yield Request(record * self._spec.images_per_caption + image, caption, seed, attempts=tried)


def _run_guard(monitor: "ActorHandle", policy: "FaultPolicy", spec: GeneratorSpec) -> "RunGuard":
    from cluster.generation.stages.guard import RunGuard  # imports torch, which the null generator does not need

    return RunGuard(monitor, policy, compiles=spec.compile != "none")


_OF_DRAWING = ("attempts", "batch_size", "image", "width", "height")
DRAWN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("corpus_id", pa.string()),
        ("caption", pa.string()),
        ("seed", pa.int64()),
        ("reason", pa.string()),
        ("attempts", pa.int32()),
        ("batch_size", pa.int32()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
