"""What a budget buys: a number of pictures, found once from the source's statistics, before anything is drawn."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.curation.redraw.settings import GPU_SECONDS, PICTURES
from cluster.dataset.keys import shard_number, stats_key
from cluster.dataset.lineage import Lineage, LineageSource
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.generation.cost import SECONDS_AN_HOUR
from cluster.store.store import Store, open_store
from pcm.errors import InputError, one_line

#: Shards whose statistics are read: evenly spaced ones where there are more.
_MOST_STATS = 1000
_REQUESTS_AT_ONCE = 16


def seconds_per_picture(source: OpenDataset) -> float | None:
    """How long a generator of the source (a GPU, where it was drawn on GPUs) took for a stored picture, drawing and
    scoring; None where nothing says so: an import, a dataset that an earlier release drew. Of a derived dataset that of
    the datasets that it was taken from, as far as they are still there and in the same state.

    Raises InputError for statistics that are damaged.
    """
    shards = [(drawn.store, shard.key) for drawn in _drawn(source) for shard in drawn.shards]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = list(pool.map(lambda shard: _times(*shard), shards[:: max(1, -(-len(shards) // _MOST_STATS))]))
    seconds, pictures = sum(each[0] for each in found), sum(each[1] for each in found)
    return seconds / pictures if seconds > 0 and pictures else None


def _drawn(source: OpenDataset) -> Iterator[OpenDataset]:
    """The datasets that drew a dataset's pictures: itself, those that a view points at, or the sources of one that was
    written out."""
    manifest = source.manifest
    if manifest.lineage is None:
        yield source
        return
    committed = {each.sha256: each.committed for each in _all_sources(manifest.lineage)}
    for each in manifest.pictures or manifest.lineage.sources:
        if found := _as_it_was(each.path, each.sha256, committed.get(each.sha256)):
            yield from _drawn(found)


def _all_sources(lineage: Lineage) -> Iterator[LineageSource]:
    """With those of its sources that were derived themselves."""
    for each in lineage.sources:
        yield each
        if each.lineage is not None:
            yield from _all_sources(Lineage.from_dict(each.lineage))


def _as_it_was(path: str, sha256: str, committed: Sequence[int] | None) -> OpenDataset | None:
    """The dataset at a place in the state in which it was; None where it is gone or another. committed: the shards that
    it had, if it was unfinished."""
    try:
        found = open_dataset(open_store(path), unfinished=True, shards=committed)
    except InputError:
        return None
    return found if found.sha256 == sha256 else None


def _times(store: Store, shard: str) -> tuple[float, int]:
    key = stats_key(shard_number(shard))
    try:
        stats = json.loads(store.read_bytes(key))
        return float(stats.get("draw_seconds", 0)) + float(stats.get("featurise_seconds", 0)), int(stats["successes"])
    except FileNotFoundError:
        return 0.0, 0
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"{store.root}/{key}: damaged ({one_line(error, longest=200)}); run jobs.verify --repair"
        ) from None


def pictures_of(budget: float, unit: str, *, seconds: float | None, price_per_hour: float | None, data: str) -> int:
    """How many pictures a budget buys, rounded down. `seconds`: of one picture.

    Raises InputError where nothing tells how long a picture takes, and where the budget buys none.
    """
    if unit == PICTURES:
        return int(budget)
    if seconds is None:
        raise InputError(
            f"--budget-in {unit}: nothing says how long the pictures of {data} took (it was imported, or its source is "
            "gone or another now); give --budget in pictures"
        )
    if unit == GPU_SECONDS:
        bought = budget / seconds
    else:
        assert price_per_hour is not None
        bought = budget / (price_per_hour * seconds / SECONDS_AN_HOUR)
    if bought < 1:
        raise InputError(
            f"--budget {budget:g}: buys no picture; one takes {seconds:.3g} s of a generator in {data}, so give more"
        )
    return int(bought)
