"""Export to the published files, under the names by which the published code reads them:

    mscoco_caption_anno_train.pkl     a list of dicts: image_id, split_id, tokens_ids, target_ids, clipscore
    mscoco_caption_anno_val.pkl ...   of --val and --test: a dict a photo with all its sentences, without split_id
    features/NAME_sp0/6000000.npz     features (N, D_v) and g_feature (1, D), float32; of photos features/NAME/ID.npz
    captions_val.json ...             COCO's captions of --val and --test
    vocabulary.txt concepts.pickle    as published training reads them
    pcmnet.yaml                       the lines of a published configuration that name all these
    images/NAME_sp0/6000000.jpg       as stored, byte for byte
    clip_head.pth captions.jsonl      what the published files leave out: the CLIP head, the sentences as written

Ids: see cluster.export.published_ids. Quarantined pictures leave a gap. Folders hold 67,801 places.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch

from cluster.dataset.keys import CLIP_HEAD_KEY, VOCABULARY_KEY, VOCABULARY_KEYS
from cluster.dataset.vocabulary_files import check_vocabularies, made_again, stored_concepts
from cluster.export.published_ids import PublishedIds, published_ids
from cluster.export.source import Source
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.images import image_ending
from pcm.official.checkpoint import OFFICIAL_CONCEPTS_FILE
from pcm.official.files import (
    ANNOTATIONS_END,
    ANNOTATIONS_START,
    Annotation,
    annotations_piece,
    checkpoint_to_pth,
    concepts_to_pickle,
    features_to_npz,
)
from pcm.records import feature_matrix
from pcm.text.vocabulary import Vocabulary

#: The published code builds the name from its data set class: MSCoCoDataset or Flickr30kCapDataset.
CORPORA = {"mscoco": "MSCoCoDataset", "flickr30k": "Flickr30kCapDataset"}
CAPTIONS_KEY = "captions.jsonl"
OFFICIAL_HEAD_KEY = "clip_head.pth"
SETTINGS_KEY = "pcmnet.yaml"
_PARTS = "parts"


def annotations_key(corpus: str, stage: str) -> str:
    """stage: train, val or test."""
    return f"{corpus}_caption_anno_{stage}.pkl"


class Official:
    """cluster.export.source.Format. `photos`: val and test, datasets of real photos, by stage.

    Raises InputError for a name that is no folder's, a length below 2, or photos with features of another CLIP.
    """

    def __init__(
        self, source: Source, out: Store, *, name: str, max_length: int, corpus: str, photos: dict[str, Source]
    ) -> None:
        if not name or set(name) & set("/\\{}") or name.startswith("."):
            raise InputError(f"--name {name!r}: must be the beginning of a folder's name")
        if max_length < 2:
            raise InputError(f"--max-length {max_length}: must be at least 2, a word and the end")
        for stage, other in photos.items():
            conflicts = source.manifest.spec.clip.conflicts(other.manifest.spec.clip)
            if source.manifest.features != other.manifest.features or conflicts:
                raise InputError(
                    f"--{stage} {other.store.root}: features of another CLIP than {source.store.root}; featurise both "
                    "with one CLIP"
                )
        self._source = source
        self._out = out
        self._name = name
        self._max_length = max_length
        self._corpus = corpus
        self._photos = photos

    def prepare(self) -> dict[str, bytes]:
        for key in VOCABULARY_KEYS:
            if not self._source.store.exists(key):
                more = made_again(self._source.store, self._source.manifest, key)
                if self._source.manifest.spec.clip.model == "null":
                    more = ", as the null CLIP leaves none; export a dataset with features, or --to webdataset"
                raise InputError(f"{self._source.store.root}: has no {key}{more}")
        check_vocabularies(self._source.store)
        self._ids, self._photo_ids = published_ids(self._source, self._photos)
        text = self._source.store.read_bytes(VOCABULARY_KEY)
        self._vocabulary = Vocabulary.from_text(text.decode())
        head = safetensors.torch.load(self._source.store.read_bytes(CLIP_HEAD_KEY))
        official = {f"visual_embed.{name}": head[name] for name in sorted(head)}
        return {
            VOCABULARY_KEY: text,
            OFFICIAL_CONCEPTS_FILE: concepts_to_pickle(stored_concepts(self._source.store)),
            OFFICIAL_HEAD_KEY: checkpoint_to_pth(official),
            SETTINGS_KEY: self._settings().encode(),
        }

    def marker(self, shard: int) -> str:
        return f"{_PARTS}/{shard:06d}.annotations"

    def write(self, shard: int) -> None:
        annotations, captions = [], []
        for annotation, caption in self._rows(self._source, shard, self._ids):
            annotations.append(annotation)
            captions.append({"image_id": annotation.image_id, "caption": caption})
        lines = "".join(json.dumps(caption, ensure_ascii=False) + "\n" for caption in captions)
        self._out.write_bytes(f"{_PARTS}/{shard:06d}.captions", lines.encode())
        self._out.write_bytes(self.marker(shard), annotations_piece(annotations))

    def _rows(self, source: Source, shard: int, ids: PublishedIds) -> list[tuple[Annotation, str]]:
        """An annotation and its caption for each row; pictures and features are written once a picture."""
        table = source.read(shard)
        features = source.manifest.features
        patches = feature_matrix(table["patch_features"]).reshape(-1, features.num_patches, features.patch_dim)
        images = feature_matrix(table["global_feature"])
        rows: list[tuple[Annotation, str]] = []
        written = set()
        light = table.select(["sample_id", "caption", "image", "clip_score"]).to_pylist()
        positions = source.positions(shard, [row["sample_id"] for row in light])
        for number, row in enumerate(light):
            picture = row["image"]["bytes"]
            found = ids.of(row["sample_id"], row["image"]["path"], positions[number])
            folder = self._name if found.split_id is None else f"{self._name}_sp{found.split_id}"
            if found not in written:
                self._out.write_bytes(f"images/{folder}/{found.image_id}.{image_ending(picture)}", picture)
                npz = features_to_npz(patches[number], images[number])
                self._out.write_bytes(f"features/{folder}/{found.image_id}.npz", npz)
                written.add(found)
            words = self._vocabulary.encode_all([row["caption"]], self._max_length)
            rows.append((Annotation(found.image_id, found.split_id, *words, (row["clip_score"],)), row["caption"]))
        return rows

    def written(self, shard: int) -> None:
        pass

    def finish(self, shards: Sequence[None]) -> None:
        """Join the parts. Holds the annotations in memory, as everything does that reads them. Raises InputError where
        another job has joined and deleted them meanwhile."""
        numbers = range(self._source.num_shards)
        captions = [f"{_PARTS}/{shard:06d}.captions" for shard in numbers]
        pieces = [self.marker(shard) for shard in numbers]
        try:
            with ThreadPoolExecutor(16) as pool:
                lines = b"".join(pool.map(self._out.read_bytes, captions))
                joined = b"".join((ANNOTATIONS_START, *pool.map(self._out.read_bytes, pieces), ANNOTATIONS_END))
        except FileNotFoundError:
            raise InputError(
                f"--out {self._out.root}: another job has finished this export meanwhile; run the same command again"
            ) from None
        self._out.write_bytes(CAPTIONS_KEY, lines)
        self._out.write_bytes(annotations_key(self._corpus, "train"), joined)
        for stage, source in self._photos.items():
            self._write_photos(stage, source)

    def _write_photos(self, stage: str, source: Source) -> None:
        """Annotations, features and COCO's captions of real photos: a dict a photo with all its sentences."""
        ids = self._photo_ids[stage]
        by_photo: dict[str, list[tuple[Annotation, str]]] = {}
        for shard in range(source.num_shards):
            for annotation, caption in self._rows(source, shard, ids):
                by_photo.setdefault(annotation.image_id, []).append((annotation, caption))
        annotations = [
            Annotation(
                image_id,
                None,
                np.concatenate([annotation.token_ids for annotation, _ in sentences]),
                np.concatenate([annotation.target_ids for annotation, _ in sentences]),
                None,
            )
            for image_id, sentences in by_photo.items()
        ]
        data = b"".join((ANNOTATIONS_START, annotations_piece(annotations), ANNOTATIONS_END))
        self._out.write_bytes(annotations_key(self._corpus, stage), data)
        captions = {image_id: [caption for _, caption in sentences] for image_id, sentences in by_photo.items()}
        self._out.write_bytes(f"captions_{stage}.json", coco_captions(captions, ids.file_names))

    def _settings(self) -> str:
        """YAML for the published code: paths are below the folder that its lines name, to be put where it is."""
        spec, features = self._source.manifest.spec, self._source.manifest.features
        split = ["''" if stage not in self._photos else f"'{CORPORA[self._corpus]}'" for stage in ("val", "test")]
        files = ["None" if stage not in self._photos else f"captions_{stage}.json" for stage in ("val", "test")]
        return "\n".join(
            (
                "# The lines of a published configuration (configs/*/*/train.yaml) that this export decides. Put the",
                f"# whole path before each name, or start in this folder. CLIP of the features: {spec.clip.model}.",
                "DATASETS:",
                f"  TRAIN: '{CORPORA[self._corpus]}'",
                f"  VAL: {split[0]}",
                f"  TEST: {split[1]}",
                "DATALOADER:",
                f"  FEATS_FOLDER: 'features/{self._name}'",
                "  ANNO_FOLDER: '.'",
                f"  MAX_FEAT_NUM: {features.num_patches + 1}",
                "MODEL:",
                f"  VOCAB_SIZE: {len(self._vocabulary)}",
                f"  MAX_SEQ_LEN: {self._max_length}",
                "  VISUAL_EMBED:",
                f"    IN_DIM: {features.patch_dim}",
                f"    G_IN_DIM: {features.embed_dim}",
                "    CLIPTAG:",
                f"      VOCAB_EMBED_PATH: '{OFFICIAL_CONCEPTS_FILE}'",
                "INFERENCE:",
                f"  VOCAB: '{VOCABULARY_KEY}'",
                f"  VAL_ANNFILE: '{files[0]}'",
                f"  TEST_ANNFILE: '{files[1]}'",
                "",
            )
        )

    def tidy(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self._out.delete, self._out.list(_PARTS)))


def coco_captions(captions: dict[str, list[str]], file_names: Mapping[str, str]) -> bytes:
    """COCO's caption file, which pycocotools reads: image ids are numbers."""
    images = [{"id": int(image_id), "file_name": file_names.get(image_id, image_id)} for image_id in captions]
    pairs = [(int(image_id), caption) for image_id, texts in captions.items() for caption in texts]
    annotations = [
        {"id": number, "image_id": image_id, "caption": caption} for number, (image_id, caption) in enumerate(pairs)
    ]
    document: dict[str, Any] = {
        "info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations,
    }  # fmt: skip
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()
