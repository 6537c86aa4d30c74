"""Pictures of rows that the lineage of a derived dataset names: those that its rules left out, and others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.dataset.documents import StoredShard
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.rows import read_shard
from cluster.report.dataset_facts import Row, in_parallel
from cluster.report.gallery import Picture, thumbnail
from cluster.store.store import open_store
from pcm.errors import InputError, StoreFailure, one_line
from pcm.images import open_image

#: The fact of a lineage that says how far two CLIPs' scores agree (cluster.ingest.another_clip).
AGREEMENT = "agreement"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that went, why, and of a duplicate the row that stays in its place."""

    picture: Picture
    why: str
    beside: Picture | None


def left_out_pictures(lineage: Lineage, *, of: str) -> dict[str, list[LeftOut]]:
    """By rule; under AGREEMENT the pairs of which two CLIPs think most differently, which stay. `of`: the dataset.

    A picture that is no longer there is said on its card, for the dataset stands without it.
    Raises InputError where the lineage's examples are damaged.
    """
    try:
        return _by_rule(lineage, of)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{MANIFEST_KEY}: its lineage is damaged ({one_line(error)}); make the dataset again"
        ) from None


def _by_rule(lineage: Lineage, dataset: str) -> dict[str, list[LeftOut]]:
    groups = {rule.rule: rule.examples for rule in lineage.rules}
    if told := lineage.facts.get(AGREEMENT):
        groups[AGREEMENT] = tuple(told["examples"])
    rows: dict[tuple, None] = {}
    for examples in groups.values():
        for example in examples:
            for shown in filter(None, (example, example.get("beside"))):
                rows[_place(shown, dataset)] = None
    by_shard: dict[tuple, list[int]] = {}
    for *shard, row in rows:
        by_shard.setdefault(tuple(shard), []).append(row)
    read = in_parallel(lambda item: list(_read(*item, dataset)), list(by_shard.items()))
    found = dict(pair for pairs in read for pair in pairs)

    def picture(shown: dict[str, Any]) -> Picture:
        row = Row(
            shard=0, row=int(shown["picture"]["row"]), sample_id=str(shown["sample_id"]), caption=str(shown["caption"]),
            seed=found[_place(shown, dataset)][1], clip_score=float(shown["clip_score"]),
        )  # fmt: skip
        return _picture(row, found[_place(shown, dataset)][0])

    return {
        name: [
            LeftOut(
                picture=picture(example),
                why=str(example["why"]),
                beside=picture(example["beside"]) if example.get("beside") else None,
            )
            for example in examples
        ]
        for name, examples in groups.items()
    }


def _place(shown: dict[str, Any], dataset: str) -> tuple:
    """(dataset, key, rows, bytes, sha256, row); of `dataset` itself where it names no other."""
    shard = shown["picture"]["shard"]
    return (
        shown["picture"].get("path", dataset),
        shard["key"],
        shard["rows"],
        shard["bytes"],
        shard["sha256"],
        shown["picture"]["row"],
    )


def _read(shard: tuple, rows: Iterable[int], dataset: str) -> Iterable[tuple[tuple, tuple[bytes | str, int]]]:
    """(place, (picture, or why there is none, seed)) of some rows of a shard.

    Raises StoreFailure where the dataset itself cannot be read; where another one cannot, that is why.
    """
    path, key, count, size, sha256 = shard
    try:
        stored = StoredShard(key, count, size, sha256)
        table = read_shard(open_store(path), stored, ["image", "seed"], checksum=False)
    except (InputError, StoreFailure) as error:
        if isinstance(error, StoreFailure) and path == dataset:
            raise
        yield from (((*shard, row), (str(error), 0)) for row in rows)
        return
    for row in rows:
        cell = table["image"][row].as_py() or {}
        yield (*shard, row), (cell.get("bytes") or b"", table["seed"][row].as_py())


def _picture(row: Row, data: bytes | str) -> Picture:
    try:
        if isinstance(data, str):
            return Picture(row=row, error=data)
        image = open_image(data, name=row.sample_id)
    except InputError as error:
        return Picture(row=row, error=str(error))
    return Picture(row=row, uri=thumbnail(image), width=image.width, height=image.height)
