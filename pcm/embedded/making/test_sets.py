"""The held-out "real photos": varied scenes in the drawing style no training saw, five references each, as Parquet."""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pcm.embedded.making.art import Artist
from pcm.embedded.making.captions import references
from pcm.embedded.making.world import FIRST, Domain, Scene, sample_scene

REFERENCES = 5
FEATURES = {
    "image_id": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "references": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
}
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("references", pa.list_(pa.string())),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def test_scenes(seed: int, count: int, domain: Domain = FIRST) -> list[Scene]:
    """`count` scenes of different content in the domain's unseen style; the same ones every time for one seed."""
    rng = random.Random(seed)
    scenes: dict[tuple, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, style=domain.unseen_style, variety="varied", domain=domain)
        scenes.setdefault(scene.content, scene)
    return list(scenes.values())


def write_test_set(path: Path, domain: Domain, split: str, count: int, art_folder: Path) -> None:
    """Draws the scenes and writes image_id, image (PNG, shown as an Image by `datasets`) and references."""
    seed = domain.test_seeds[split]
    artist, rng = Artist(art_folder), random.Random(seed + 1)
    rows = []
    for number, scene in enumerate(test_scenes(seed, count, domain)):
        png = io.BytesIO()
        Image.fromarray(artist.draw(scene)).save(png, "PNG", optimize=True)
        name = f"{domain.test_sets[split].replace('@', '-')}-{number:04d}"
        picture = {"bytes": png.getvalue(), "path": f"{name}.png"}
        rows.append({"image_id": name, "image": picture, "references": references(scene, rng, REFERENCES)})
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
