"""Damaged datasets: every job that takes one says in one line what is wrong and names jobs.verify."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.dataset import read_dataset
from cluster.dataset.documents import load_manifest, load_plan
from cluster.dataset.keys import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    MANIFEST_KEY,
    NOUNS_KEY,
    PLAN_KEY,
    VOCABULARIES_KEY,
    VOCABULARY_KEY,
    shard_key,
    stats_key,
)
from cluster.dataset.vocabularies import NounFinder, store_vocabularies, stored_nouns
from cluster.ingest.text_only import text_only_dataset
from cluster.store.store import open_store
from cluster.sweep.trial import shared_tables
from cluster.training.data.batches import BatchShape
from cluster.training.data.mixture import open_training_sets
from cluster.training.feed import TrainingData
from cluster.training.request import DataSource, TrainRequest
from cluster.training.train import planned_run
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary
from tests.helpers.shards import describe_anew
from tests.helpers.tiny_dataset import TINY
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, tiny_spec, write_corpus
from tests.helpers.tiny_models import save_tiny_clip

SHARD = shard_key(0)
DEEP = b"[" * 200_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path, tiny_clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    corpus, spec = write_corpus(folder, CAPTIONS[:12]), tiny_spec(tiny_t2i, tiny_clip)
    store, plan, _ = make_dataset_in_process(folder / "data", corpus, spec, shard_size=6)
    store_vocabularies(store, plan, encoder=ClipEncoder.from_spec(plan.spec.clip))
    return folder / "data"


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """The first shard changed, and the manifest speaks of what lies there: nothing but its content is wrong."""

    def damage(folder: Path) -> None:
        table = change(pq.read_table(folder / SHARD))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        (folder / SHARD).write_bytes(sink.getvalue())
        describe_anew(open_store(folder))

    return damage


def with_column(name: str, change: Callable[[pa.Table], pa.Array]) -> Callable[[Path], None]:
    return rewritten(lambda table: table.set_column(table.schema.get_field_index(name), name, change(table)))


def document(key: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / key).write_text(json.dumps(json.loads((folder / key).read_bytes()) | fields))

    return damage


def content(key: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / key).write_bytes(data) and None


def cut(key: str) -> Callable[[Path], None]:
    return lambda folder: (folder / key).write_bytes((folder / key).read_bytes()[:-40]) and None


def nan_patches(table: pa.Table) -> pa.Array:
    kind = table.schema.field("patch_features").type
    return pa.array([np.full(kind.byte_width // 2, np.nan, np.float16).tobytes()] * len(table), kind)


def nulls(name: str) -> Callable[[pa.Table], pa.Array]:
    return lambda table: pa.array([None, *table[name].to_pylist()[1:]], table.schema.field(name).type)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "another shard": lambda folder: shutil.copyfile(folder / shard_key(1), folder / SHARD) and None,
    "an empty file": content(SHARD, b""),
    "no shard": lambda folder: (folder / SHARD).unlink(),
    "a shard cut short": cut(SHARD),
    "no rows": rewritten(lambda table: table.slice(0, 0)),
    **{f"no {name}": rewritten(lambda table, name=name: table.drop_columns([name]))
       for name in ("caption", "sample_id", "clip_score", "global_feature", "patch_features", "image", "status")},
    **{f"a null {name}": with_column(name, nulls(name))
       for name in ("caption", "sample_id", "clip_score", "global_feature", "image")},
    "captions that are numbers": with_column("caption", lambda table: pa.array(range(len(table)))),
    "features of another size": with_column(
        "global_feature",
        lambda table: pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * len(table), np.float16)), 3),
    ),
    "features that are text": with_column("patch_features", lambda table: table["caption"]),
    "NaN features": with_column("patch_features", nan_patches),
    "NaN scores": with_column("clip_score", lambda table: pa.array(np.full(len(table), np.nan, np.float32))),
    "a schema from the future": document(MANIFEST_KEY, schema_version=99),
    "a manifest without shards": document(MANIFEST_KEY, shards=[{"key": SHARD}]),
    "a manifest of texts": document(MANIFEST_KEY, stored="twelve", features="many"),
    "a deep manifest": content(MANIFEST_KEY, DEEP),
    "a deep plan": content(PLAN_KEY, DEEP),
    "deep statistics": content(stats_key(0), DEEP),
    "statistics that are a list": content(stats_key(0), b"[]"),
    "statistics of texts": content(stats_key(0), b'{"start_time": "now", "end_time": [], "successes": null}'),
    "a vocabulary that is no text": content(VOCABULARY_KEY, b"\xff\xfe\x00"),
    "a vocabulary of fewer words": content(VOCABULARY_KEY, b"cat\ndog\n"),
    "concepts cut short": cut(CONCEPTS_KEY),
    "a CLIP head cut short": cut(CLIP_HEAD_KEY),
}  # fmt: skip


#: One of these is in every error; a schema of a later release is nothing to judge.
ADVICE = ("jobs.verify", "jobs.generate", "schema version 99")


@pytest.mark.parametrize("key", [VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY])
def test_of_words_concepts_and_head_those_that_are_intact_stay(key: str, whole: Path, tmp_path: Path) -> None:
    """Another device, or another release of what finds nouns, would make others, and runs go on only with the same."""
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    store, keys = open_store(folder), (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY)
    before = {each: (folder / each).read_bytes() for each in keys}
    (folder / key).unlink()
    plan = load_plan(store)
    assert plan is not None
    store_vocabularies(store, plan, encoder=ClipEncoder(str(save_tiny_clip(tmp_path / "other", seed=5))))
    changed = [each for each in keys if (folder / each).read_bytes() != before[each]]
    assert changed == ([] if key == VOCABULARY_KEY else [key])


def test_what_found_the_nouns_is_told_by_the_concepts_where_its_object_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.dataset.vocabularies.noun_finder", lambda nouns: (f"spacy:{nouns}", None))
    store = open_store(tmp_path)
    NounFinder("one").store(store)
    store.write_bytes(VOCABULARIES_KEY, b"{}")
    store.write_bytes(CONCEPTS_KEY, ConceptVocabulary(("cat",), np.eye(1, dtype=np.float32), "spacy:one").to_bytes())
    store.write_bytes(NOUNS_KEY, b"{")
    with pytest.raises(InputError, match=r"nouns.json: damaged; delete it and run the same command again"):
        NounFinder("one").store(store)
    store.delete(NOUNS_KEY)
    with pytest.raises(InputError, match="was begun with --nouns one; give the same"):
        NounFinder("another").store(store)
    NounFinder("one").store(store)
    assert stored_nouns(store) == "one"


def train(folder: Path, _: Path) -> None:
    """What the driver and a worker of jobs.train do with a dataset."""
    run = planned_run(
        TrainRequest(
            data=str(folder), out="unused", overrides=TINY | {"epochs": 1, "holdout_fraction": 0.5, "seed": 1}
        ),
        cpus=1,
    )
    vocabulary = Vocabulary.from_text(run.vocabularies.words.decode())
    manifest = open_training_sets(run.data)[0].manifest
    shape = BatchShape(features=manifest.features, batch_size=8, max_length=12)
    data = TrainingData(run, shape, vocabulary, device=torch.device("cpu"))
    data.open()
    list(data.batches(0, start_step=0))
    assert data.validation is not None


def sweep(folder: Path, _: Path) -> None:
    sets = open_training_sets([DataSource(str(folder))])
    shared_tables(sets[0].store, sets[0].shards)


def text_only(folder: Path, out: Path) -> None:
    store = open_store(folder)
    clip = load_manifest(store).spec.clip.model
    text_only_dataset(store, open_store(out), ClipEncoder(clip))


READERS: dict[str, Callable[[Path, Path], object]] = {
    "train": train,
    "read_dataset": lambda folder, _: [row.image_bytes for row in read_dataset(folder)],
    "read_dataset unfinished": lambda folder, _: [row.caption for row in read_dataset(folder, unfinished=True)],
    "text only": text_only,
}


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "data")
    DAMAGES[request.param](tmp_path / "data")
    return tmp_path / "data"


def test_what_reads_a_damaged_dataset_reads_it_or_says_what_is_wrong(damaged: Path, tmp_path: Path) -> None:
    for name, read in READERS.items():
        try:
            read(damaged, tmp_path / f"out of {name}")
        except InputError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 700, name
            assert any(advice in said for advice in ADVICE), f"{name}: {said}"


@pytest.mark.parametrize("job", ["verify", "export", "report"])
def test_jobs_that_take_a_damaged_dataset_end_in_one_line(job: str, damaged: Path, tmp_path: Path, call_job) -> None:
    given = {
        "verify": [damaged],
        "export": ["--data", damaged, "--out", tmp_path / "export", "--to", "huggingface"],
        "report": ["--data", damaged, "--out", tmp_path / "report.html"],
    }[job]
    run = call_job(job, *given)
    assert run.returncode in (0, 1, 2) and "Traceback" not in run.stderr
    if run.returncode == 2:
        assert any(advice in run.stderr for advice in ADVICE), run.stderr


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_each_damage(case: str, whole: Path, tmp_path: Path, call_job) -> None:
    shutil.copytree(whole, tmp_path / "data")
    DAMAGES[case](tmp_path / "data")
    run = call_job("verify", tmp_path / "data")
    assert run.returncode == 2 or (run.returncode == 1 and run.summary["ok"] is False)
    assert "Traceback" not in run.stderr
