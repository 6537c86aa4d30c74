"""What a run says of libraries that are of another release than those that drew before, or than draw elsewhere."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cluster.dataset.committed import CommittedShards
from cluster.dataset.documents import Plan, find_whole_manifest
from cluster.dataset.environment import DRAWN_IN, load_environment, other_releases, versions
from cluster.dataset.keys import shard_key
from cluster.dataset.parquet import UNREADABLE, pyarrow_here, pyarrow_of
from cluster.store.store import Store
from pcm.errors import InputError

log = logging.getLogger(__name__)

#: Of the shards that are made again, so many are looked at: what a release wrote lies together.
_LOOKED_AT = 20


def warn_of_mixed_releases(store: Store, stats: Mapping[str, Any], seen: set[str]) -> None:
    """One line for each kind of machine that draws with other releases than the driver has. `seen`: their digests."""
    digest = stats.get(DRAWN_IN)
    if not digest or digest in seen:
        return
    seen.add(digest)
    found = load_environment(store, digest)
    if found is not None and (others := other_releases(versions(), found["versions"])):
        log.warning(
            "shard %d was drawn with other releases than the driver has: %s; pictures may differ between them: run one "
            "image on all nodes",
            stats["shard"], ", ".join(others),
        )  # fmt: skip


def needed_pyarrow(store: Store, plan: Plan, missing: Collection[int], on_store: CommittedShards) -> str | None:
    """The release of pyarrow that has to write where shards of a finished dataset are made again: that of those beside
    them. Each release writes its name into a shard, so that the rows are the same and the bytes are not. None where
    any will do.

    `missing`: all that are to be made; those that no manifest lists are new. Raises InputError where this process has
    another release.
    """
    if (manifest := find_whole_manifest(store)) is None:
        return None  # what is made of an unfinished dataset knows that it changes
    made_again = sorted(shard for shard in missing if shard < len(manifest.shards))
    there = sorted(set(filter(on_store.__contains__, range(plan.num_shards))) - set(missing))
    beside = {_pyarrow_beside(store, shard, there) for shard in made_again[:_LOOKED_AT]}
    found = sorted(release for release in beside if release is not None)
    if found and found != [pyarrow_here()]:
        many = str(len(made_again)) if len(found) == 1 else "some"
        mend = f"install pyarrow {found[0]}, or" if len(found) == 1 else "none of these releases makes all of them:"
        raise InputError(
            f"{store.root}: its shards were written by pyarrow {' and '.join(found)}, and this is {pyarrow_here()}, "
            f"which would make {many} of them again with the same rows in other bytes: views, runs and exports would "
            f"not know this dataset again; {mend} run jobs.verify --repair --other-bytes and make those anew"
        )
    return pyarrow_here() if found else None


def _pyarrow_beside(store: Store, shard: int, there: Sequence[int]) -> str | None:
    """The release that wrote the nearest shard of those that are there; None where that cannot be told."""
    if not there:
        return None
    try:
        return pyarrow_of(store, shard_key(min(there, key=lambda number: abs(number - shard))))
    except UNREADABLE:
        return None
