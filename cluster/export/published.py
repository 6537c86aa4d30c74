"""Export to the published files: pictures and npz features by image id, annotations, vocabulary, concepts.

    images/NAME_sp0/6000000.jpg       as stored, byte for byte
    features/NAME_sp0/6000000.npz     features (N, D_v) and g_feature (1, D), float32
    annotations.pickle                a list of dicts: image_id, split_id, tokens_ids, target_ids, clipscore
    vocabulary.txt concepts.pickle    as published training reads them
    clip_head.pth captions.jsonl      what the published files leave out: the CLIP head, the sentences as written

The picture at place k of the plan has the id 6000000 + k; quarantined ones leave a gap. Folders hold 67,800 places, the
last one the remainder too.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import safetensors.torch

from cluster.dataset.layout import CLIP_HEAD_KEY, CONCEPTS_KEY, VOCABULARY_KEY
from cluster.export.source import Source
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.images import image_ending
from pcm.official.files import (
    ANNOTATIONS_END,
    ANNOTATIONS_START,
    FIRST_IMAGE_ID,
    Annotation,
    annotations_piece,
    checkpoint_to_pth,
    concepts_to_pickle,
    features_to_npz,
    split_of,
    stack_sentences,
)
from pcm.records import feature_matrix
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

ANNOTATIONS_KEY = "annotations.pickle"
CAPTIONS_KEY = "captions.jsonl"
OFFICIAL_CONCEPTS_KEY = "concepts.pickle"
OFFICIAL_HEAD_KEY = "clip_head.pth"
_PARTS = "parts"


class Official:
    """cluster.export.source.Format. Raises InputError for a name that is no folder's or a length below 2."""

    def __init__(self, source: Source, out: Store, *, name: str, max_length: int) -> None:
        if not name or set(name) & set("/\\{}") or name.startswith("."):
            raise InputError(f"--name {name!r}: must be the beginning of a folder's name")
        if max_length < 2:
            raise InputError(f"--max-length {max_length}: must be at least 2, a word and the end")
        self._source = source
        self._out = out
        self._name = name
        self._max_length = max_length

    def prepare(self) -> None:
        for key in (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY):
            if not self._source.store.exists(key):
                raise InputError(
                    f"{self._source.store.root}: has no {key}, as the null CLIP leaves none; "
                    "export a dataset with features, or --to webdataset"
                )
        text = self._source.store.read_bytes(VOCABULARY_KEY)
        self._vocabulary = Vocabulary.from_text(text.decode())
        self._out.write_bytes(VOCABULARY_KEY, text)
        concepts = ConceptVocabulary.from_bytes(self._source.store.read_bytes(CONCEPTS_KEY))
        self._out.write_bytes(OFFICIAL_CONCEPTS_KEY, concepts_to_pickle(concepts))
        head = safetensors.torch.load(self._source.store.read_bytes(CLIP_HEAD_KEY))
        official = {f"visual_embed.{name}": head[name] for name in sorted(head)}
        self._out.write_bytes(OFFICIAL_HEAD_KEY, checkpoint_to_pth(official))

    def marker(self, shard: int) -> str:
        return f"{_PARTS}/{shard:06d}.annotations"

    def write(self, shard: int) -> None:
        table = self._source.read(shard)
        rows = len(table)
        features = self._source.manifest.features
        patches = feature_matrix(table["patch_features"]).reshape(rows, features.num_patches, features.patch_dim)
        images = feature_matrix(table["global_feature"])
        annotations, captions = [], []
        light = table.select(["sample_id", "caption", "image", "clip_score"]).to_pylist()
        for number, row in enumerate(light):
            position = self._source.position(row["sample_id"])
            image_id = str(FIRST_IMAGE_ID + position)
            split_id = split_of(position, self._source.plan.expected)
            folder = f"{self._name}_sp{split_id}"
            picture = row["image"]["bytes"]
            self._out.write_bytes(f"images/{folder}/{image_id}.{image_ending(picture)}", picture)
            npz = features_to_npz(patches[number], images[number])
            self._out.write_bytes(f"features/{folder}/{image_id}.npz", npz)
            token_ids, target_ids = stack_sentences(self._vocabulary, [row["caption"]], self._max_length)
            annotations.append(Annotation(image_id, split_id, token_ids, target_ids, (row["clip_score"],)))
            captions.append({"image_id": image_id, "caption": row["caption"]})
        lines = "".join(json.dumps(caption, ensure_ascii=False) + "\n" for caption in captions)
        self._out.write_bytes(f"{_PARTS}/{shard:06d}.captions", lines.encode())
        self._out.write_bytes(self.marker(shard), annotations_piece(annotations))

    def finish(self) -> None:
        """Join the parts. Holds the annotations in memory, as everything does that reads them."""
        shards = range(self._source.plan.num_shards)
        captions = [f"{_PARTS}/{shard:06d}.captions" for shard in shards]
        pieces = [self.marker(shard) for shard in shards]
        with ThreadPoolExecutor(16) as pool:
            self._out.write_bytes(CAPTIONS_KEY, b"".join(pool.map(self._out.read_bytes, captions)))
            joined = b"".join((ANNOTATIONS_START, *pool.map(self._out.read_bytes, pieces), ANNOTATIONS_END))
            self._out.write_bytes(ANNOTATIONS_KEY, joined)

    def tidy(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self._out.delete, self._out.list(_PARTS)))
