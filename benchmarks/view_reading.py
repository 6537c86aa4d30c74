"""Samples a second that training reads from a view whose rows use any picture, against the dataset that it points at.

    python -m benchmarks.view_reading                       # 4,096 rows of the published size
    python -m benchmarks.view_reading --rows 540000 --shard-rows 256 --patches 1 --rounds 3

Random features of ViT-L/14, as benchmarks.data_path writes them, with 64 patches or fewer: with one, what is read and
chosen a row weighs most, and 540,000 rows fit on a disk. The view is of the kind that SynC makes: `--keep` of the
captions, each with a picture drawn at random, so that some pictures have several captions and some none. Both are read
by the same loader, every epoch anew, in turns, from files whose pages were dropped from the cache as far as the system
heeds posix_fadvise. Medians of the rounds, and the median of the quotients.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.data_path import FEATURES, PICTURE_BYTES, _loader, drop_from_cache, read_shards, write_shards
from benchmarks.matmul_rate import machine
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import Manifest
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import OpenDataset
from cluster.dataset.view import ViewRows, write_view
from cluster.store.store import open_store
from cluster.training.data.selection import Selection, all_rows
from pcm.records import FeatureShape
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec


def opened(folder: Path, selection: Selection, features: FeatureShape) -> OpenDataset:
    entries = tuple(
        {**{name: getattr(shard, name) for name in ("key", "rows", "bytes", "sha256")}, "quarantined": 0}
        for shard in selection.shards
    )
    spec = DatasetSpec(generator=GeneratorSpec(model="null", revision=""), clip=ClipSpec(model="none", revision=""))
    manifest = Manifest(
        spec=spec, corpus="", corpus_fingerprint="", features=features, expected=len(selection), stored=len(selection),
        quarantined=0, quarantined_by_reason={}, clip_score_mean=None, shard_bytes=0, shards=entries,
    )  # fmt: skip
    return OpenDataset(open_store(folder), manifest, None, "0" * 64)


def random_view(source: OpenDataset, out: Path, *, keep: float) -> Manifest:
    places = np.array([(shard, row) for shard, each in enumerate(source.shards) for row in range(each.rows)])
    kept = round(keep * len(places))
    chosen = places[np.random.default_rng(1).integers(len(places), size=kept)]
    rows = ViewRows(
        sample_id=[f"{number:09d}-00" for number in range(kept)],
        caption=[f"word{number % 5000} word{number % 777}" for number in range(kept)],
        clip_score=np.full(kept, 0.3, np.float32),
        source=np.zeros(kept, np.int64),
        shard=chosen[:, 0],
        row=chosen[:, 1],
    )
    lineage = Lineage(method="random", settings={}, sources=(lineage_source(source),), rows_in=len(places))
    return write_view(open_store(out), [source], rows, lineage)


def measure(folder: Path, *, rows: int, shard_rows: int, rounds: int, patches: int, keep: float) -> dict:
    source = folder / "source"
    source.mkdir()
    features = replace(FEATURES, num_patches=patches)
    picture_bytes = PICTURE_BYTES * patches // FEATURES.num_patches  # not read by training, so only the disk's business
    selection = write_shards(source, rows=rows, shard_rows=shard_rows, features=features, picture_bytes=picture_bytes)
    started = time.perf_counter()
    view = random_view(opened(source, selection, features), folder / "view", keep=keep)
    written = time.perf_counter() - started
    loaders = {
        "source": _loader(source, selection, None, features),
        "view": _loader(folder / "view", all_rows(view), None, features),
    }
    for loader in loaders.values():
        read_shards(loader, 0)
    counts = {"source": rows, "view": view.stored}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    work: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(rounds):
        for name in loaders if epoch % 2 else reversed(loaders):
            drop_from_cache(folder)
            before = time.process_time()
            rates[name].append(read_shards(loaders[name], epoch))
            work[name].append(1e6 * (time.process_time() - before) / counts[name])
    quotients = [view / source for view, source in zip(rates["view"], rates["source"], strict=True)]
    busy = [source / view for view, source in zip(work["view"], work["source"], strict=True)]
    return {
        "samples_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "cpu_microseconds_per_sample": {name: round(statistics.median(values)) for name, values in work.items()},
        "view_over_source": round(statistics.median(quotients), 3),
        "spread": [round(min(quotients), 3), round(max(quotients), 3)],
        "view_over_source_by_cpu": round(statistics.median(busy), 3),
        "write_seconds": round(written, 2),
        "rows": rows,
        "patches": patches,
        "keep": keep,
        "rounds": rounds,
        **machine("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, default=FEATURES.num_patches)
    parser.add_argument("--keep", type=float, default=1.0, help="share of the captions that the view keeps")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        found = measure(
            Path(folder),
            rows=asked.rows, shard_rows=asked.shard_rows, rounds=asked.rounds, patches=asked.patches, keep=asked.keep,
        )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
