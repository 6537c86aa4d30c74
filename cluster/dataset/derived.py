"""How a derived dataset is begun: from which sources, by which record, and by one job at a time."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.dataset.documents import Manifest, OtherSchema, find_manifest
from cluster.dataset.keys import LINEAGE_KEY, MANIFEST_KEY, shard_number
from cluster.dataset.lineage import Lineage, LineageSource
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.store.outputs import refuse_other_things
from cluster.store.store import Store, open_store
from pcm.documents import document_bytes
from pcm.errors import InputError, OneLineError

log = logging.getLogger(__name__)


def lineage_source(found: OpenDataset) -> LineageSource:
    """How a lineage names a dataset that rows were taken from."""
    manifest = found.manifest
    return LineageSource(
        path=found.store.address,
        sha256=found.sha256,
        rows=manifest.stored,
        shards=len(manifest.shards),
        planned_shards=found.planned_shards,
        generator=manifest.spec.generator.model,
        committed=tuple(shard_number(shard.key) for shard in found.shards) if found.is_unfinished else None,
        lineage=manifest.lineage.without_examples() if manifest.lineage else None,
    )


def open_source(uri: str, out: str | None, *, unfinished: bool = False, number: int = 0) -> OpenDataset:
    """A dataset that rows of a view at `out` are to be taken from: of an unfinished one the shards with which the view
    was begun, whatever has come since. number: which of the view's sources it is.

    Raises InputError as open_dataset does, and for an `out` in this dataset or in one that holds its pictures.
    """
    store = open_store(uri)
    shards = _begun_with(open_store(out), store, number) if unfinished and out is not None else None
    found = open_dataset(store, unfinished=unfinished, shards=shards)
    if out is not None:
        _refuse_inside(open_store(out), found)
    return found


def begun_settings(out: Store) -> dict[str, Any]:
    """The settings of the derived dataset that was begun at `out`; empty where there is none, or its record is damaged,
    which is named when it is compared."""
    try:
        return dict(json.loads(out.read_bytes(LINEAGE_KEY))["settings"])
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return {}


def _begun_with(out: Store, source: Store, number: int) -> list[int] | None:
    """The numbers of the shards; None where nothing was begun of this unfinished dataset, or all is done."""
    if out.exists(MANIFEST_KEY):
        return None
    try:
        record = json.loads(out.read_bytes(LINEAGE_KEY))
        committed = record["unfinished"]
        if isinstance(committed, dict):  # an earlier release named them by where they lay
            shards = next(iter(committed.values())) if len(record["sources"]) == 1 else committed[source.address]
        else:
            shards = committed[number]
        return None if shards is None else [int(shard) for shard in shards]
    except (FileNotFoundError, ValueError, TypeError, LookupError):  # a damaged one is named when it is compared
        return None


def claim(
    out: Store, lineage: Lineage, *, materialise: bool = False, check: Callable[[], None] = lambda: None
) -> Manifest | None:
    """Begin a view whose rows have still to be found: what `write_view` says first, for a method that puts work of its
    own below `out` meanwhile. The manifest where the view is there already. check: called where it is not, once
    LINEAGE_KEY lies there; of a check that raises OneLineError nothing stays, unless another job has put more there.

    Raises InputError where `out` holds anything else.
    """
    document = lineage_record(lineage, materialise=materialise, shard_rows=None)
    if (found := begun(out, document)) is None:
        is_new = not out.exists(LINEAGE_KEY)
        out.write_bytes(LINEAGE_KEY, document_bytes(document))
        try:
            check()
        except OneLineError:
            if is_new and out.list() == [LINEAGE_KEY]:
                out.delete(LINEAGE_KEY)
            raise
    return found


@contextmanager
def claimed_alone(
    out: Store,
    lineage: Lineage,
    *,
    materialise: bool = False,
    join: Callable[[], None],
    check: Callable[[], None],
) -> Iterator[Manifest | None]:
    """`claim`, by the only job at `out` until the end of the context. Another one that is at work there is waited for,
    and its manifest given. join: starts Ray, unless the view is there already."""
    from cluster.only_job import MAKES, only_job  # brings Ray, which takes seconds

    if (found := begun(out, lineage_record(lineage, materialise=materialise, shard_rows=None))) is not None:
        yield found
        return
    join()
    with only_job(out, MAKES, waits=True):
        yield claim(out, lineage, materialise=materialise, check=check)


def lineage_record(lineage: Lineage, *, materialise: bool, shard_rows: int | None) -> dict:
    """What lineage.json says."""
    return {**lineage.decides(), "materialise": materialise, "shard_rows": shard_rows}


def _refuse_inside(out: Store, source: OpenDataset) -> None:
    """Raises InputError for a place that would be deleted and moved with a dataset."""
    for place in (source.store.address, *(each.path for each in source.manifest.pictures)):
        if out.address.startswith(f"{place}/"):
            raise InputError(f"--out {out.root}: lies in the dataset {place}; give a place beside it")


def begun(out: Store, document: dict) -> Manifest | None:
    """The manifest where this very thing is done already. Raises InputError where OUT holds anything else."""
    try:
        found = json.loads(out.read_bytes(LINEAGE_KEY))
    except FileNotFoundError:
        refuse_other_things(out, "no derived dataset")
        return None
    except ValueError:
        raise InputError(f"--out {out.root}: {LINEAGE_KEY} is damaged; give another --out") from None
    document = _as_compared(json.loads(document_bytes(document)))
    found = _as_compared(found)
    if found != document:
        named = next(
            (name for name in document if not isinstance(found, dict) or found.get(name) != document[name]), ""
        )
        other_data = "of other data, or of the data in another state"
        said = {"sources": other_data, "settings": "with other settings"}
        what = said.get(named, f"with another {named}")
        if named == "settings":
            what += f" ({'; '.join(_changes(found.get('settings'), document['settings']))})"
        raise InputError(
            f"--out {out.root}: was begun {what}; use the same arguments and data to finish it, or another --out"
        )
    try:
        return find_manifest(out)
    except OtherSchema:  # it says much, to another release
        raise
    except InputError as error:
        log.warning("%s; it is written again", error)
        return None


def _as_compared(document: Any) -> Any:
    """Without the shards of unfinished sources too: the state of a source is that of these shards."""
    without = _without_paths(document)
    return {name: without[name] for name in without if name != "unfinished"} if isinstance(without, dict) else without


def _without_paths(document: Any) -> Any:
    """Files that were given, such as lists of marks, without where they lie: their sha256 tells them apart."""
    if not isinstance(document, dict):
        return document
    known = document.keys() - {"path"} if "sha256" in document else document.keys()
    return {name: _without_paths(value) for name, value in document.items() if name in known}


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """The settings that differ, as "sentences.model: 'a' -> 'b'"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name or 'settings'}: {before!r:.100} -> {now!r:.100}"
