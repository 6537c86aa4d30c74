"""Concepts of a file in place of a corpus's own nouns: datasets of photos, training, and what is refused."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from cluster.dataset.keys import CONCEPTS_KEY, GIVEN_CONCEPTS_KEY
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import store_vocabularies
from cluster.generation.make import generate, prepare
from cluster.generation.repair import repair_dataset
from cluster.generation.request import GenerateRequest
from cluster.ingest.photos import featurise_photos
from cluster.ingest.request import FeaturiseRequest
from cluster.only_job import MAKES, only_job
from cluster.store.store import open_store
from cluster.training.request import TrainRequest
from cluster.training.run_document import refuse_other_run
from cluster.training.run_record import VOCABULARIES_FIELD
from cluster.training.train import planned_run
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.official.files import concepts_to_pickle
from pcm.text.concepts import ConceptVocabulary
from tests.helpers.tiny_dataset import TINY, write_dataset, write_pictures
from tests.helpers.tiny_generation import write_corpus
from tests.helpers.waiting import wait_until

NAMES = ("sea", "sky", "dog", "street", "bird", "hat")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """pictures/, references.csv, data/, coco.pickle as published, other.pickle, wide.pickle of another CLIP."""
    folder = tmp_path_factory.mktemp("concepts")
    write_pictures(folder / "pictures", count=4)
    write_dataset(folder / "data", tiny_clip, rows=30)
    texts = ClipEncoder(str(tiny_clip)).encode_texts(list(NAMES))
    (folder / "coco.pickle").write_bytes(concepts_to_pickle(ConceptVocabulary(NAMES, texts)))
    (folder / "other.pickle").write_bytes(concepts_to_pickle(ConceptVocabulary(NAMES[:5], texts[:5])))
    (folder / "wide.pickle").write_bytes(concepts_to_pickle(ConceptVocabulary(NAMES, np.eye(6, 999, dtype=np.float32))))
    return folder


def asked(world: Path, clip: Path, out: Path, concepts: str | None) -> FeaturiseRequest:
    given = None if concepts is None else str(world / concepts)
    captions = str(world / "references.csv")
    return FeaturiseRequest(
        images=str(world / "pictures"), captions=captions, clip=str(clip), out=str(out), concepts=given, device="cpu"
    )


def test_a_dataset_keeps_the_concepts_that_it_was_given(world: Path, tiny_clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    featurise_photos(asked(world, tiny_clip, out, "coco.pickle"))
    stored = (out / "concepts.safetensors").read_bytes()
    assert ConceptVocabulary.from_bytes(stored).names == NAMES
    (out / "vocabularies.json").unlink()  # as when the corpus has grown: words are counted again, concepts stay
    featurise_photos(asked(world, tiny_clip, out, None))
    assert (out / "concepts.safetensors").read_bytes() == stored
    with pytest.raises(InputError, match="was begun with other --concepts"):
        featurise_photos(asked(world, tiny_clip, out, "other.pickle"))
    assert (out / "concepts.safetensors").read_bytes() == stored


def test_given_concepts_that_are_damaged_are_given_again(world: Path, tiny_clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    featurise_photos(asked(world, tiny_clip, out, "coco.pickle"))
    concepts, said = out / "concepts.safetensors", (out / "vocabularies.json").read_bytes()
    whole = concepts.read_bytes()
    others = ConceptVocabulary(NAMES[::-1], ConceptVocabulary.from_bytes(whole).embeddings).to_bytes()
    for damage, found, why in (
        (lambda: concepts.write_bytes(others), "its sha256 is not the one in concepts.json", "not the concepts"),
        (concepts.unlink, "missing", "missing"),
    ):
        damage()
        before = sorted(out.rglob("*"))
        assert verify(open_store(out))["problems"] == [f"concepts.safetensors: {found}"]
        with pytest.raises(InputError, match=rf"concepts.safetensors: {why}.*with the same --concepts$"):
            repair_dataset(str(out))
        assert sorted(out.rglob("*")) == before and (out / "vocabularies.json").read_bytes() == said
        (out / "vocabularies.json").unlink()  # as when the run that began it was killed
        with pytest.raises(InputError, match=rf"concepts.safetensors: {why}.*with the same --concepts$"):
            featurise_photos(asked(world, tiny_clip, out, None))
        featurise_photos(asked(world, tiny_clip, out, "coco.pickle"))
        assert verify(open_store(out))["ok"] and concepts.read_bytes() == whole


def test_a_dataset_with_its_own_concepts_does_not_change_them(world: Path, tiny_clip: Path, tmp_path: Path) -> None:
    featurise_photos(asked(world, tiny_clip, tmp_path / "out", None))
    with pytest.raises(InputError, match="was begun with the concepts of its own captions"):
        featurise_photos(asked(world, tiny_clip, tmp_path / "out", "coco.pickle"))


def test_a_job_that_waits_gives_the_one_at_work_no_concepts(
    world: Path, tiny_clip: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, out = write_corpus(tmp_path), open_store(tmp_path / "data")
    given = GenerateRequest(
        corpus=str(corpus), out=out.root, t2i="null", clip=str(tiny_clip), concepts=str(world / "coco.pickle"),
        shard_size=5,
    )  # fmt: skip
    planned = prepare(out, dataclasses.replace(given, concepts=None))
    said: list[str] = []

    def generates() -> None:
        try:
            generate(given)
        except InputError as error:
            said.append(str(error))

    waiting = threading.Thread(target=generates)
    with only_job(out, MAKES, waits=True):
        waiting.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        assert not out.exists(GIVEN_CONCEPTS_KEY) and not out.exists(CONCEPTS_KEY)
        store_vocabularies(out, planned.plan, encoder=ClipEncoder(str(tiny_clip)))
    waiting.join(60)
    assert len(said) == 1 and "was begun with the concepts of its own captions; leave --concepts out" in said[0]
    assert not out.exists(GIVEN_CONCEPTS_KEY)


def test_concepts_of_another_clip_are_refused_before_anything_is_written(
    world: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"embeddings of 999 dimensions, the CLIP's have \d+"):
        featurise_photos(asked(world, tiny_clip, tmp_path / "out", "wide.pickle"))
    wide = str(world / "wide.pickle")
    settings = {"corpus": "embedded", "t2i": "null", "out": str(tmp_path / "out"), "concepts": wide}
    with pytest.raises(InputError, match="embeddings of 999 dimensions"):
        generate(GenerateRequest(**settings, clip=str(tiny_clip)))
    with pytest.raises(InputError, match="without effect with --clip null"):
        generate(GenerateRequest(**settings))
    assert not (tmp_path / "out").exists()


def test_training_takes_concepts_of_a_file_and_says_so_in_its_config(world: Path, tmp_path: Path) -> None:
    request = TrainRequest(
        data=str(world / "data"), out=str(tmp_path), preset="embedded", overrides=TINY,
        concepts=str(world / "coco.pickle"),
    )  # fmt: skip
    run = planned_run(request, cpus=1)
    assert ConceptVocabulary.from_bytes(run.vocabularies.concepts).names == NAMES
    assert run.config.model.num_concepts == len(NAMES)
    own = planned_run(dataclasses.replace(request, concepts=None), cpus=1)
    assert "concepts" not in own.document and own.config.model.num_concepts != len(NAMES)
    for document, previous in ((run.document, own.document), (own.document, run.document)):
        of_earlier_release = {name: value for name, value in previous.items() if name != VOCABULARIES_FIELD}
        with pytest.raises(InputError, match=r"was begun otherwise .*[( ]concepts: "):
            refuse_other_run(open_store(tmp_path), json.loads(json.dumps(of_earlier_release)), document)
    refuse_other_run(open_store(tmp_path), json.loads(json.dumps(run.document)), run.document)
