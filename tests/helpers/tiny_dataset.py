"""A real dataset of coloured shapes, small enough to train on in seconds."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from cluster.dataset.documents import Manifest, load_manifest
from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, MANIFEST_KEY, VOCABULARY_KEY, shard_key
from cluster.dataset.parquet import parquet_bytes
from cluster.store.store import open_store
from cluster.training.config import preset
from pcm.captioners.captioner import captioner_files
from pcm.captioners.interface import CLIP_OPTION, CONFIG_FILE
from pcm.captioners.pcmnet.model import PCMNet
from pcm.clip.encoder import ClipEncoder
from pcm.documents import document_bytes
from pcm.records import STORED, feature_columns, shard_schema
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("square", "circle", "bar")
SIDE = 32


def scene(index: int) -> tuple[str, Image.Image]:
    """(caption, picture) of scene `index`; captions repeat, pictures of one caption differ a little."""
    random = np.random.default_rng(index)
    colour, ground = random.choice(len(COLOURS), 2, replace=False)
    shape = SHAPES[random.integers(len(SHAPES))]
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
    draw = ImageDraw.Draw(image)
    left, top = random.integers(2, 12, 2).tolist()
    box = (left, top, left + 16, top + (5 if shape == "bar" else 16))
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
    return f"A {COLOURS[colour]} {shape} on a {COLOURS[ground]} ground.", image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_dataset(
    root: Path,
    clip: Path,
    *,
    rows: int = 96,
    shard_size: int = 20,
    nan_row: int | None = None,
    zero_row: int | None = None,
    nan_global_row: int | None = None,
    first: int = 0,
    scores: np.ndarray | None = None,
    attempts: Sequence[int] | None = None,
    reasons: Sequence[str] | None = None,
) -> Path:
    """A finished dataset of `rows` scenes from number `first` on; the patch features of row `nan_row` are NaN, the
    global feature of row `zero_row` is zero, that of row `nan_global_row` NaN.

    scores: (rows,) in place of those of the CLIP, which are nearly all alike.
    """
    encoder = ClipEncoder(str(clip))
    scenes = [scene(first + index) for index in range(rows)]
    captions = [caption for caption, _ in scenes]
    encoded = encoder.encode_images([image for _, image in scenes])
    texts = encoder.encode_texts(captions)
    features = encoder.features
    global_feature = encoded.global_feature.astype(np.float16)
    patch_features = encoded.patch_features.astype(np.float16)
    if nan_row is not None:
        patch_features[nan_row] = np.nan
    if zero_row is not None:
        global_feature[zero_row] = 0
    if nan_global_row is not None:
        global_feature[nan_global_row] = np.nan
    table = pa.table(
        {
            "sample_id": [f"{first + index:09d}-00" for index in range(rows)],
            "caption": captions,
            "image": [{"bytes": png(image), "path": f"{index:09d}-00.png"} for index, (_, image) in enumerate(scenes)],
            "width": [SIDE] * rows,
            "height": [SIDE] * rows,
            "seed": list(range(rows)),
            "attempts": [1] * rows if attempts is None else attempts,
            "batch_size": [4] * rows,
            "clip_score": (encoded.global_feature * texts).sum(axis=1).clip(0.3, 1.0).astype(np.float32)
            if scores is None
            else scores.astype(np.float32),
            **feature_columns(global_feature, patch_features),
            "status": [STORED] * rows,
            "reason": [""] * rows if reasons is None else reasons,
        },
        schema=shard_schema(features),
    )
    store = open_store(root)
    shards = []
    for number, start in enumerate(range(0, rows, shard_size)):
        part = table.slice(start, shard_size)
        data = parquet_bytes(part)
        store.write_bytes(shard_key(number), data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(
            {"key": shard_key(number), "rows": len(part), "quarantined": 0, "sha256": digest, "bytes": len(data)}
        )
    store.write_bytes(VOCABULARY_KEY, Vocabulary.build(captions, min_count=1).to_text().encode())
    nouns = (*SHAPES, *COLOURS, "ground")
    store.write_bytes(CONCEPTS_KEY, ConceptVocabulary(nouns, encoder.encode_texts(list(nouns))).to_bytes())
    store.write_bytes(CLIP_HEAD_KEY, safetensors.torch.save(encoder.head()))
    manifest = Manifest(
        spec=DatasetSpec(
            generator=GeneratorSpec(model="null", revision=""), clip=ClipSpec(model=str(clip), revision="test")
        ),
        corpus="scenes",
        corpus_fingerprint="",
        features=features,
        expected=rows,
        stored=rows,
        quarantined=0,
        quarantined_by_reason={},
        clip_score_mean=None,
        shard_bytes=0,
        shards=tuple(shards),
    )
    store.write_bytes(MANIFEST_KEY, manifest.to_json())
    return root


def write_checkpoint(folder: Path, dataset: Path) -> Path:
    """The checkpoint of an untrained captioner for a dataset; beside it the record of a run that named its CLIP."""
    manifest = load_manifest(open_store(dataset))
    vocabulary, concepts = Vocabulary.load(dataset / VOCABULARY_KEY), ConceptVocabulary.load(dataset / CONCEPTS_KEY)
    config = preset("embedded").with_overrides(TINY)
    config = config.for_dataset(
        vocab_size=len(vocabulary), features=manifest.features, num_concepts=len(concepts.names)
    )
    torch.manual_seed(0)
    model = PCMNet(config.model)
    model.set_concepts(torch.from_numpy(concepts.embeddings))
    model.set_clip_head(safetensors.torch.load_file(dataset / CLIP_HEAD_KEY))
    files = captioner_files(
        model,
        document={"clip": {"model": manifest.spec.clip.model, "dtype": "float32"}},
        vocabulary=(dataset / VOCABULARY_KEY).read_bytes(),
        concepts=(dataset / CONCEPTS_KEY).read_bytes(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder.parent / CONFIG_FILE).write_bytes(document_bytes({CLIP_OPTION: manifest.spec.clip.model}))
    return folder


def write_pictures(folder: Path, *, count: int, first: int = 1000) -> Path:
    """PNG files of scenes that no dataset here holds, and references.csv beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for index in range(first, first + count):
        caption, image = scene(index)
        (folder / f"scene{index}.png").write_bytes(png(image))
        lines += [f'scene{index}.png,"{caption}"', f'scene{index}.png,"There is {caption[0].lower()}{caption[1:]}"']
    (folder.parent / "references.csv").write_text("\n".join(lines) + "\n")
    return folder


def pictures_of(world: Path) -> dict[str, str]:
    """Fields of a request: `pictures/` of a folder and references.csv there."""
    return {"images": str(world / "pictures"), "references": str(world / "references.csv")}


#: Overrides of TrainConfig that make a run of seconds.
TINY = {
    "epochs": 2,
    "batch_size": 8,
    "warmup_steps": 20,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "max_length": 12,
    "validation_beam_size": 1,
    "holdout_fraction": 0.15,
}
NO_NOISE = {
    **{name: 0.0 for name in ("hidden_dropout", "attention_dropout", "visual_dropout", "word_dropout")},
    "output_dropout": 0.0,
    "noise_variance": 0.0,
}
