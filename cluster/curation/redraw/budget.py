"""What a budget buys: a number of pictures, found once from the source's statistics, before anything is drawn."""

import json
from concurrent.futures import ThreadPoolExecutor

from cluster.curation.redraw.settings import GPU_SECONDS, PICTURES
from cluster.dataset.layout import shard_number, stats_key
from cluster.dataset.opened import OpenDataset
from cluster.generation.cost import SECONDS_AN_HOUR
from pcm.errors import InputError, one_line

#: Shards whose statistics are read: evenly spaced ones where there are more.
_MOST_STATS = 1000
_REQUESTS_AT_ONCE = 16


def seconds_per_picture(source: OpenDataset) -> float | None:
    """How long a generator of the source (a GPU, where it was drawn on GPUs) took for a stored picture, drawing and
    scoring; None where nothing says so: a view, an import, a dataset that an earlier release drew.

    Raises InputError for statistics that are damaged.
    """
    if source.plan is None:
        return None
    shards = source.shards[:: max(1, -(-len(source.shards) // _MOST_STATS))]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = list(pool.map(lambda shard: _times(source, shard.key), shards))
    seconds, pictures = sum(each[0] for each in found), sum(each[1] for each in found)
    return seconds / pictures if seconds > 0 and pictures else None


def _times(source: OpenDataset, shard: str) -> tuple[float, int]:
    key = stats_key(shard_number(shard))
    try:
        stats = json.loads(source.store.read_bytes(key))
        return float(stats.get("draw_seconds", 0)) + float(stats.get("featurise_seconds", 0)), int(stats["successes"])
    except FileNotFoundError:
        return 0.0, 0
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"{source.store.root}/{key}: damaged ({one_line(error, longest=200)}); run jobs.verify --repair"
        ) from None


def pictures_of(budget: float, unit: str, *, seconds: float | None, price_per_hour: float | None, data: str) -> int:
    """How many pictures a budget buys, rounded down. `seconds`: of one picture.

    Raises InputError where nothing tells how long a picture takes, and where the budget buys none.
    """
    if unit == PICTURES:
        return int(budget)
    if seconds is None:
        raise InputError(
            f"--budget-in {unit}: {data} does not say how long its pictures took (a view, an import); give --budget in "
            "pictures"
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
