"""The demo's two pictures to look at: what was drawn, and what the captioner says of real pictures."""

import json
from pathlib import Path

from PIL import Image

from cluster.dataset.documents import load_manifest
from cluster.dataset.parquet import read_table
from cluster.store.store import Store, open_store
from pcm import embedded
from pcm.contact_sheet import Cell, contact_sheet
from pcm.images import open_image

SHEET_CELLS = 24


def pictures_sheet(store: Store) -> Image.Image:
    """The best, middle and worst pictures of a dataset by clip score, a third of the sheet each."""
    columns = ["sample_id", "caption", "image", "clip_score"]
    rows = [
        row for shard in load_manifest(store).shards for row in read_table(store, shard["key"], columns).to_pylist()
    ]
    rows.sort(key=lambda row: (-row["clip_score"], row["sample_id"]))
    third = SHEET_CELLS // 3
    middle = max(0, len(rows) // 2 - third // 2)
    chosen = rows if len(rows) <= SHEET_CELLS else rows[:third] + rows[middle : middle + third] + rows[-third:]
    return contact_sheet(
        [Cell(open_image(row["image"]["bytes"]), (f"{row['clip_score']:.3f}", row["caption"])) for row in chosen]
    )


def captions_sheet(results: Path) -> Image.Image:
    """Held-out real pictures with the caption made for each, and the first reference."""
    made = {
        entry["image_id"]: entry["caption"]
        for entry in json.loads((results / "captions.json").read_text(encoding="utf-8"))
    }
    photos = read_table(open_store(embedded.test_set_path("test")), "").to_pylist()
    return contact_sheet(
        [
            Cell(open_image(photo["image"]["bytes"]), (made[photo["image_id"]], f"({photo['references'][0]})"))
            for photo in photos[:SHEET_CELLS]
        ]
    )
