"""Export to a dataset that needs no other: a view, or what is there of an unfinished dataset, with its pictures."""

import time
from typing import Any

from cluster.curation.rows import read_index
from cluster.dataset.derived import lineage_source, open_source
from cluster.dataset.environment import made_by
from cluster.dataset.lineage import Lineage
from cluster.dataset.view import write_view
from cluster.export.request import ExportRequest
from cluster.store.store import Store
from pcm.errors import InputError


def export_as_dataset(data: Store, out: Store, asked: ExportRequest) -> dict[str, Any]:
    """Write the rows out with their pictures; the counts. The fingerprint of a view stays what it was.

    Raises InputError for a finished dataset that holds its pictures already, and where `out` holds anything else.
    """
    started = time.monotonic()
    source = open_source(data.root, out.root, unfinished=asked.unfinished)
    if not (source.manifest.is_view or source.is_unfinished):
        raise InputError(
            f"--data {data.root}: holds its pictures already; copy its folder, or export --to another format"
        )
    rows = read_index([source])
    lineage = Lineage(method="export", settings={}, sources=(lineage_source(source),), rows_in=len(rows))
    manifest = write_view(
        out, [source], rows.for_view(), lineage, materialise=True, run_on=asked.run_on, made_by=made_by(out)
    )
    counts: dict[str, Any] = {"exported": manifest.stored, "quarantined": 0, "expected": manifest.expected}
    if source.is_unfinished:
        counts["unfinished"] = source.extent
    return {
        **counts,
        "shards": len(manifest.shards),
        "fingerprint": manifest.fingerprint,
        "seconds": round(time.monotonic() - started, 2),
    }
