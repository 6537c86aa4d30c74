"""First stage: captions to pictures."""

import time

import pyarrow as pa

from cluster.dataset import plan_part_key, read_table
from cluster.plan import USABLE_REASONS
from cluster.stages.shard_row import ShardRow
from cluster.storage import Store
from pcm.spec import DatasetSpec
from pcm.text_to_image import Drawing, Request, load_generator


class DrawShard:
    """Generator pool: plan part in, drawings (or the reasons why there are none) out."""

    def __init__(self, store: Store, spec: DatasetSpec) -> None:
        self._store = store
        self._spec = spec
        self._generator = load_generator(spec.generator)

    def __call__(self, block: pa.Table) -> pa.Table:
        shard = block["shard"][0].as_py()
        started = time.time()
        plan = read_table(self._store, plan_part_key(shard))
        return ShardRow(
            shard, self.draw(plan), {"start_time": started, "draw_seconds": time.time() - started}
        ).to_block()

    def draw(self, plan: pa.Table) -> pa.Table:
        """The plan's rows with columns image (bytes), width, height, attempts, and their final seed and reason."""
        rows = plan.to_pylist()
        usable = [row for row in rows if row["reason"] in USABLE_REASONS]
        drawings = iter(self._generator.draw([self._request(row) for row in usable]))
        none = Drawing(b"", 0, 0, 0, 0, 0)
        drawn = []
        for row in rows:
            drawing = next(drawings) if row["reason"] in USABLE_REASONS else none
            drawn.append(
                row
                | {"image": drawing.image, "width": drawing.width, "height": drawing.height}
                | {"attempts": drawing.attempts, "seed": drawing.seed if drawing.attempts else row["seed"]}
                | {"reason": drawing.reason or row["reason"], "batch_size": drawing.batch_size}
            )
        return pa.Table.from_pylist(drawn, schema=_DRAWN_SCHEMA)

    def _request(self, row: dict) -> Request:
        position = row["record_index"] * self._spec.images_per_caption + row["image_index"]
        return Request(position=position, caption=row["caption"], seed=row["seed"])


_DRAWN_SCHEMA = pa.schema(
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
