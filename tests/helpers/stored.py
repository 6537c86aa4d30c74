"""What lies in the folder of a dataset, and that it is proven."""

from pathlib import Path

import pyarrow.parquet as pq

from cluster.dataset.verify import verify
from cluster.store.store import Store, open_store


def file_contents(folder: Path) -> dict[str, bytes]:
    """Path within the folder -> its bytes, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards_stored(folder: Path) -> int:
    """How many shards lie there now."""
    return len(list((folder / "shards").glob("*.parquet")))


def quarantine_reasons(store: Store) -> dict[str, str]:
    """Id in the corpus -> reason, of every quarantined sample."""
    tables = [pq.read_table(store.path(key)).to_pylist() for key in store.list("quarantine")]
    return {row["corpus_id"]: row["reason"] for table in tables for row in table}


def proven(dataset: Store | str | Path) -> dict:
    """The report on a dataset that verification finds nothing wrong with."""
    report = verify(dataset if isinstance(dataset, Store) else open_store(dataset))
    assert report["ok"], report
    assert report["expected"] == report["stored"] + report["quarantined"]
    return report
