"""A small real dataset with everything that training needs, made without Ray, for tests of exports and imports."""

import json
from pathlib import Path

import safetensors.torch

from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, VOCABULARY_KEY
from cluster.dataset.vocabularies import planned_captions
from cluster.store.store import Store
from pcm.clip.encoder import ClipEncoder
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary
from tests.helpers.tiny_generation import make_dataset_in_process, tiny_spec

#: The third cannot be used, the fifth is longer than CLIP's context in the plan's eyes.
CAPTIONS = (
    "A dog near the beach.", "A man's cat on a table!", "   ", "Two birds, one horse.", "snow " * 101 + "dog",
    "A cow in the street", "A sheep on snow", "The zebra's T-shirt",
)  # fmt: skip


def make_complete_dataset(out: Path, *, t2i: Path, clip: Path, **settings: object) -> tuple[Store, Plan, Manifest]:
    """CAPTIONS drawn by the tiny models, three samples a shard, with vocabulary, concepts and CLIP head."""
    out.mkdir(parents=True, exist_ok=True)
    spec = tiny_spec(t2i, clip, **settings)  # type: ignore[arg-type]
    corpus = out.parent / f"{out.name}-corpus"
    corpus.mkdir(exist_ok=True)
    path = corpus / "captions.jsonl"
    path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in CAPTIONS))
    store, plan, manifest = make_dataset_in_process(out, path, spec, shard_size=3)
    assert manifest is not None
    encoder = ClipEncoder(str(clip), batch_size=4)
    captions = list(planned_captions(store, plan))
    store.write_bytes(VOCABULARY_KEY, Vocabulary.build(captions, min_count=1).to_text().encode())
    concepts = ConceptVocabulary.build(captions, encoder, size=400, at_least=0, nouns="lexicon")
    store.write_bytes(CONCEPTS_KEY, concepts.to_bytes())
    metadata = {"features": json.dumps(vars(encoder.features)), "clip": str(clip)}
    store.write_bytes(CLIP_HEAD_KEY, safetensors.torch.save(encoder.head(), metadata))
    return store, plan, manifest
