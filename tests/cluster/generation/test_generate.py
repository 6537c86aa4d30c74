"""Generation with real models on real Ray: what is made does not depend on how, and a resume makes what is missing."""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import shard_key
from cluster.generation import GenerateRequest, generate
from cluster.generation.regenerate import regenerate
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from pcm.images import open_image
from tests.helpers.job_runs import JobRun, kill_once
from tests.helpers.stored import proven, shards_stored
from tests.helpers.tiny_generation import (
    CAPTIONS,
    Dataset,
    draw_in_process,
    make_dataset,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    tiny_spec,
    write_corpus,
)

LONG = "a very long caption " * 30
BAD = ["\x00", "x" * 3000]
CORPUS = [*CAPTIONS[:7], BAD[0], *CAPTIONS[7:12], LONG.strip(), BAD[1], CAPTIONS[0]]  # 16: two bad, one cut, one double


@pytest.fixture(scope="module")
def made(tiny_t2i: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory, _ray_at_end: None) -> Dataset:
    """One dataset of the tiny models, made by two generators in four shards of up to five; not to be changed."""
    from cluster.session import start_ray

    start_ray(num_cpus=2)
    folder = tmp_path_factory.mktemp("made")
    spec = tiny_spec(tiny_t2i, tiny_clip)
    return make_dataset(folder / "data", write_corpus(folder, CORPUS), spec, shard_size=5, generators=2)


@pytest.fixture
def copy(made: Dataset, tmp_path: Path) -> Dataset:
    """A copy to change."""
    shutil.copytree(made.store.prefix, tmp_path / "data")
    return dataclasses.replace(made, store=open_store(tmp_path / "data"))


def rows_of(dataset: Dataset) -> list[dict]:
    files = [Path(dataset.store.prefix) / key for key in dataset.store.list("shards")]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_every_caption_is_stored_or_quarantined_with_its_reason(made: Dataset) -> None:
    manifest = made.result.manifest
    assert (manifest.expected, manifest.stored, manifest.quarantined) == (16, 14, 2)
    assert manifest.quarantined_by_reason == {"control_characters": 1, "too_long": 1}
    assert (made.result.skipped, made.result.generated) == (0, 14)
    assert made.result.status.images_per_second > 0
    proven(made.store.root)
    assert manifest == load_manifest(made.store)


def test_rows_hold_what_the_contract_says(made: Dataset, tiny_clip: Path) -> None:
    rows = rows_of(made)
    assert [row["caption"] for row in rows] == [caption for caption in CORPUS if caption not in BAD]
    encoder = ClipEncoder(str(tiny_clip), batch_size=4)
    encoded = encoder.encode_images([open_image(row["image"]["bytes"]) for row in rows])
    texts = encoder.encode_texts([row["caption"] for row in rows])
    for index, row in enumerate(rows):
        assert open_image(row["image"]["bytes"]).size == (row["width"], row["height"]) == (32, 32)
        assert row["image"]["path"] == f"{row['sample_id']}.jpg"
        assert row["clip_score"] == pytest.approx(encoded.global_feature[index] @ texts[index], abs=1e-5)
        np.testing.assert_allclose(row["global_feature"], encoded.global_feature[index], atol=1e-3)
        np.testing.assert_allclose(
            np.frombuffer(row["patch_features"], np.float16).reshape(16, 64),
            encoded.patch_features[index],
            rtol=1e-3,
            atol=1e-3,
        )
    features = made.result.manifest.features
    assert (features.embed_dim, features.patch_dim, features.num_patches) == (32, 64, 16)
    assert len({row["image"]["bytes"] for row in rows}) == len(rows), "a caption given twice gets two pictures"


def test_a_prompt_over_the_context_is_drawn_and_marked(made: Dataset) -> None:
    reasons = {row["caption"]: row["reason"] for row in rows_of(made)}
    assert reasons.pop(LONG.strip()) == "prompt_truncated"
    assert set(reasons.values()) == {""}


def test_shard_size_and_number_of_workers_change_nothing(made: Dataset, tmp_path: Path, ray_session: None) -> None:
    other = make_dataset(tmp_path / "data", made.corpus, made.plan.spec, shard_size=9, generators=1)
    assert proven(other.store.root)["fingerprint"] == proven(made.store.root)["fingerprint"]
    for one, two in zip(rows_of(made), rows_of(other), strict=True):
        assert {name: one[name] for name in ("sample_id", "image", "seed")} == {
            name: two[name] for name in ("sample_id", "image", "seed")
        }
        assert one["clip_score"] == pytest.approx(two["clip_score"], abs=1e-5)


def test_a_rerun_skips_everything(made: Dataset, ray_session: None) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(made.store.prefix, "shards").iterdir()}
    again = make_dataset(made.store.root, made.corpus, made.plan.spec, shard_size=5)
    assert (again.result.skipped, again.result.generated) == (16, 0)
    assert {path: path.stat().st_mtime_ns for path in Path(made.store.prefix, "shards").iterdir()} == before
    assert again.result.manifest == made.result.manifest


def test_what_was_begun_is_finished_where_its_models_are_now(
    made: Dataset, tiny_t2i: Path, tiny_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    old = [Path(shutil.copytree(model, tmp_path / "old" / model.name)) for model in (tiny_t2i, tiny_clip)]
    store, plan = plan_dataset(tmp_path / "data", made.corpus, tiny_spec(*old))
    draw_in_process(store, plan, [1])
    begun = store.read_bytes("plan.json")
    (tmp_path / "old").rename(tmp_path / "new")
    t2i, clip = (str(tmp_path / "new" / model.name) for model in old)
    done = generate(
        GenerateRequest(
            corpus=str(made.corpus), out=store.root, t2i=t2i, clip=clip, steps=2, guidance_scale=2.0, batch_size=4,
            clip_batch_size=4, device="cpu",
        )
    )  # fmt: skip
    assert (done["generated"], done["skipped"], done["stored"]) == (10, 5, 14)
    assert store.read_bytes("plan.json") == begun and load_manifest(store).spec == plan.spec
    assert proven(store.root)["fingerprint"] == proven(made.store.root)["fingerprint"]
    assert str(tmp_path / "old" / tiny_clip.name).encode() in store.read_bytes("clip_head.safetensors")
    for key in ("vocabulary.txt", "concepts.safetensors", *store.list("shards")):
        assert store.read_bytes(key) == made.store.read_bytes(key), key


@pytest.mark.slow  # test_repair.py shows the same in less time
def test_a_lost_shard_alone_is_made_again(made: Dataset, copy: Dataset, ray_session: None) -> None:
    lost = Path(copy.store.prefix) / shard_key(1)
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    again = make_dataset(copy.store.root, made.corpus, made.plan.spec, shard_size=5)
    assert (again.result.skipped, again.result.generated) == (11, 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the others are not written again"
    assert proven(copy.store.root)["fingerprint"] == proven(made.store.root)["fingerprint"]
    assert again.result.manifest.shards == made.result.manifest.shards, "byte for byte"


def test_one_sample_is_drawn_alone_byte_for_byte(made: Dataset, tmp_path: Path) -> None:
    rows = {row["sample_id"]: row for row in rows_of(made)}
    for sample in ("000000002-00", "000000015-00"):
        report = regenerate(made.store, sample, image_out=str(tmp_path / "one.jpg"))
        assert report["matches"] is True and report["ok"] is True
        assert (report["caption"], report["seed"]) == (rows[sample]["caption"], rows[sample]["seed"])
        assert (tmp_path / "one.jpg").read_bytes() == rows[sample]["image"]["bytes"]


def test_only_says_what_does_not_match_or_exist(copy: Dataset, call_job) -> None:
    path = Path(copy.store.prefix) / shard_key(0)
    table = pq.read_table(path)
    changed = table.to_pylist()
    changed[0]["image"]["bytes"] = changed[1]["image"]["bytes"]
    pq.write_table(table.from_pylist(changed, schema=table.schema), path)
    differs = call_job("generate", "--out", copy.store.root, "--only", "000000000-00")
    assert differs.returncode == 1 and differs.summary["matches"] is False
    quarantined = call_job("generate", "--out", copy.store.root, "--only", "000000007-00")
    assert quarantined.returncode == 0 and quarantined.summary["reason"] == "control_characters"
    for sample in ("000000016-00", "000000000-01", "cat"):
        run = call_job("generate", "--out", copy.store.root, "--only", sample)
        assert run.returncode == 2 and sample in run.stderr and run.stderr.count("\n") == 1


def test_hugging_face_shows_pictures(made: Dataset) -> None:
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=f"{made.store.prefix}/shards/*.parquet", split="train",
        cache_dir=f"{made.store.prefix}-cache",
    )  # fmt: skip
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.num_rows == 14
    picture = loaded[0]["image"]
    assert picture.size == (32, 32) and np.asarray(picture).std() > 0
    assert loaded[0]["caption"] == CORPUS[0] and len(loaded[0]["patch_features"]) == 16 * 64 * 2
    metadata = pq.read_schema(Path(made.store.prefix) / shard_key(0)).metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_words_and_concepts_lie_beside_the_shards(made: Dataset) -> None:
    from pcm.text.concepts import ConceptVocabulary
    from pcm.text.vocabulary import Vocabulary

    concepts = ConceptVocabulary.from_bytes(made.store.read_bytes("concepts.safetensors"))
    assert {"cat", "dog", "beach"} <= set(concepts.names) and concepts.embeddings.shape[1] == 32
    words = made.store.read_bytes("vocabulary.txt").decode().split()
    assert {"cat", "near"} <= set(words) and isinstance(
        Vocabulary.load(Path(made.store.prefix, "vocabulary.txt")), Vocabulary
    )


def test_statistics_of_a_shard_follow_img2dataset(made: Dataset) -> None:
    parts = [json.loads(made.store.read_bytes(key)) for key in made.store.list("stats")]
    assert [part["count"] for part in parts] == [5, 5, 5, 1]
    for part in parts:
        assert part["count"] == part["successes"] + part["failed_to_generate"]
        assert part["status_dict"]["success"] == part["successes"] == sum(part["clip_score_histogram"])
        assert part["end_time"] >= part["start_time"]


def test_pictures_that_show_nothing_are_quarantined_with_the_reason(tiny_t2i: Path, tmp_path: Path) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_t2i, safety_checker=None)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    store, _, manifest = make_dataset_in_process(
        tmp_path / "data", write_corpus(tmp_path, CORPUS[:8]), tiny_spec(tmp_path / "nan", max_attempts=2)
    )
    assert manifest is not None
    assert manifest.quarantined_by_reason == {"control_characters": 1, "nan_image": 7} and manifest.stored == 0
    proven(store.root)
    quarantine = [row for key in store.list("quarantine") for row in pq.read_table(f"{store.prefix}/{key}").to_pylist()]
    assert {row["reason"]: row["attempts"] for row in quarantine} == {"nan_image": 2, "control_characters": 0}
    assert json.loads(store.read_bytes("stats/part-000000.json"))["retried"] == 5


def test_two_pictures_a_caption_are_two_samples(tmp_path: Path) -> None:
    spec = dataclasses.replace(null_spec(image_format="png"), images_per_caption=2)
    store, _, manifest = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), spec)
    rows = [row for key in store.list("shards") for row in pq.read_table(f"{store.prefix}/{key}").to_pylist()]
    assert manifest is not None and manifest.stored == len(rows) == 2 * len(CAPTIONS)
    assert len({hashlib.sha256(row["image"]["bytes"]).digest() for row in rows}) == len(rows)
    assert [row["caption"] for row in rows[::2]] == [row["caption"] for row in rows[1::2]] == list(CAPTIONS)
    proven(store.root)


@pytest.fixture
def small(tmp_path: Path) -> list[object]:
    """Arguments of the cheapest run there is."""
    return ["--corpus", write_corpus(tmp_path), "--out", tmp_path / "out", "--t2i", "null", "--shard-size", 8]


def refused(run: JobRun, said: str) -> None:
    assert run.returncode == 2 and run.summary is None
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus", "none.txt"], "none.txt"),
        (["--clip", "ViT-Z-99/openai"], "ViT-Z-99"),
        (["--t2i", "no/such/folder"], "no/such/folder"),
        (["--t2i-revision", "main", "--t2i", "nobody/nothing"], "nobody/nothing"),
        (["--dtype", "float8"], "float8"),
        (["--scheduler", "NoScheduler", "--t2i", "embedded"], "scheduler 'NoScheduler'"),
        (["--prompt-template", "a photo", "--t2i", "embedded"], "a photo"),
        (["--scheduler", "DDIMScheduler"], "--scheduler: without effect with --t2i null"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--shard-size", "-1"], "--shard-size -1: must be at least 1"),
        (["--corpus-format", "xml"], "xml"),
        (["--no-such-argument"], "--no-such-argument"),
    ],
)
def test_an_argument_that_cannot_work_is_one_line(
    arguments: list[str], said: str, small: list[object], call_job, ray_session: None, tmp_path: Path
) -> None:
    kept = [text for pair in zip(small[::2], small[1::2], strict=True) if pair[0] not in arguments for text in pair]
    refused(call_job("generate", *kept, *arguments), said)
    assert not (tmp_path / "out").exists()


def test_a_corpus_must_be_named(call_job, tmp_path: Path) -> None:
    refused(call_job("generate", "--out", tmp_path / "out"), "--corpus")


@pytest.mark.slow
def test_what_only_a_worker_can_find_wrong_ends_in_one_line_too(
    tiny_t2i: Path, small: list[object], call_job, ray_session: None, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(tiny_t2i, tmp_path / "broken"))
    (broken / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    run = call_job("generate", *small[:4], "--t2i", broken, "--clip", "null", *small[6:])
    assert run.returncode == 2 and run.summary is None
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: text-to-image model '{broken}' cannot be loaded")


def test_another_spec_on_a_finished_dataset_is_refused(small: list[object], call_job, ray_session: None) -> None:
    done = call_job("generate", *small)
    assert done.returncode == 0 and done.summary["stored"] == done.summary["expected"] == len(CAPTIONS)
    out = Path(str(small[3]))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(call_job("generate", *small, "--seed", 7), "seed: 0 -> 7")
    refused(call_job("generate", *small, "--limit", 5), "another corpus")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = call_job("generate", *small)
    assert (again.returncode, again.summary["skipped"]) == (0, len(CAPTIONS))
    assert again.summary["images_per_second"] is None, "nothing was drawn"
    checked = call_job("verify", out)
    assert checked.returncode == 0 and checked.summary["stored"] == len(CAPTIONS)
    (out / shard_key(0)).unlink()
    assert call_job("verify", out).returncode == 1


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(tmp_path: Path, run_job) -> None:
    corpus = write_corpus(tmp_path, [f"caption number {index}" for index in range(400)])
    arguments = ["--corpus", corpus, "--out", tmp_path / "out", "--t2i", "null", "--shard-size", 2]
    kill_once(lambda: shards_stored(tmp_path / "out") >= 20, [sys.executable, "-m", "jobs.generate", *arguments])
    time.sleep(2)  # what its workers had in hand is lost or written; both are allowed
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").glob("*.parquet")}
    assert 20 <= len(shards) < 200 and not (tmp_path / "out" / "dataset.json").exists()

    run = run_job("generate", *arguments)
    assert run.returncode == 0, run.stderr
    assert run.summary["skipped"] >= 2 * len(shards) > 0
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "what was there is not made again"
    make_dataset_in_process(tmp_path / "uninterrupted", corpus, null_spec(), shard_size=7)
    assert proven(tmp_path / "out")["fingerprint"] == proven(tmp_path / "uninterrupted")["fingerprint"]


@pytest.mark.slow
def test_a_dataset_on_s3_is_the_dataset_on_disk(s3_server, tmp_path: Path, run_job) -> None:
    corpus = write_corpus(tmp_path, CORPUS)
    out = f"{s3_server.uri}/generated/one"
    run = run_job(
        "generate", "--corpus", corpus, "--out", out, "--t2i", "null", "--shard-size", 5, env=s3_server.environment
    )
    assert run.returncode == 0, run.stderr
    assert (run.summary["expected"], run.summary["stored"], run.summary["dataset"]) == (16, 14, out)
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"] not in run.stderr + json.dumps(run.summary)
    checked = run_job("verify", out, env=s3_server.environment)
    assert checked.returncode == 0, checked.stderr
    make_dataset_in_process(tmp_path / "disk", corpus, null_spec(), shard_size=5)
    # On the command line "null" means 77 tokens of context no more than here: nothing is cut.
    assert checked.summary["fingerprint"] == proven(tmp_path / "disk")["fingerprint"]


@pytest.mark.slow
def test_generation_is_one_call_from_python(call_job, ray_session: None, tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path, CAPTIONS))
    made = generate(GenerateRequest(corpus=corpus, out=str(tmp_path / "python"), t2i="null", shard_size=8))
    assert (made["stored"], made["dataset"]) == (made["expected"], str(tmp_path / "python"))
    done = call_job("generate", "--corpus", corpus, "--out", tmp_path / "job", "--t2i", "null", "--shard-size", 8)
    assert done.returncode == 0, done.stderr
    assert proven(tmp_path / "python")["fingerprint"] == proven(tmp_path / "job")["fingerprint"]
