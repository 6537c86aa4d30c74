"""What importing pictures has in common wherever they come from: the spec of what nobody here drew, the columns on
their way to a shard, and shards made beside each other in threads of one process.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.dataset.committed import CommittedShards
from cluster.dataset.documents import Manifest, Plan
from cluster.device import require_gpu_here
from cluster.numbers import duration
from pcm.errors import InputError
from pcm.images import image_format_of, open_image
from pcm.line_timer import LineTimer
from pcm.spec import GeneratorSpec

log = logging.getLogger(__name__)


def undrawn(model: str, revision: str) -> GeneratorSpec:
    """The generator of pictures that no generator here drew, so that none can be drawn again."""
    return GeneratorSpec(
        model=model, revision=revision, num_inference_steps=1, guidance_scale=0.0, batch_size=1, max_attempts=1
    )


def picture_size(picture: bytes) -> tuple[int, int]:
    """(width, height). Raises InputError for what is no JPEG, PNG or WebP, or does not decode wholly."""
    if image_format_of(picture) is None:
        raise InputError("not a JPEG, PNG or WebP file")
    return open_image(picture).size


def check_gpu(device: str) -> None:
    """Raises InputError where CLIP is to be loaded on a GPU and this machine, which alone does the work, has none."""
    require_gpu_here(device, "run the job on a machine that has one, or leave --device out and give a new --out")


def sample_row(planned: dict, reason: str, picture: bytes, size: tuple[int, int]) -> dict:
    """A row of DRAWN_SCHEMA: a plan row with its picture, or with the reason why there is none."""
    return planned | {
        "reason": reason, "image": picture, "width": size[0], "height": size[1],
        "attempts": int(bool(picture)), "batch_size": int(bool(picture)),
    }  # fmt: skip


def counts(manifest: Manifest) -> dict[str, Any]:
    """What the summary of any import says of the dataset."""
    return {
        "expected": manifest.expected,
        "stored": manifest.stored,
        "quarantined": manifest.quarantined,
        "quarantined_by_reason": manifest.quarantined_by_reason,
        "clip_score_mean": manifest.clip_score_mean,
    }


def import_shards(
    make: Callable[[int], dict], made: CommittedShards, plan: Plan, missing: list[int], *, workers: int
) -> int:
    """Import the missing shards; how many samples that were. `make` commits a shard and returns its stats."""
    rows = 0
    total = sum(plan.shard_rows(shard) for shard in missing)
    timer = LineTimer()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(missing), 4 * workers):  # a window, so that a failure ends the run soon
            window = missing[start : start + 4 * workers]
            for shard, stats in zip(window, pool.map(make, window), strict=True):
                made.add(stats)
                rows += plan.shard_rows(shard)
                if timer.due():
                    rate = rows / timer.elapsed
                    left = duration((total - rows) / rate)
                    log.info("%d of %d samples, %.0f a second, %s left", rows, total, rate, left)
    return rows
