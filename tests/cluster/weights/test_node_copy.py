"""Weights on a store: copied once to a machine, whole and as they were pinned, or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.evaluation.captioners import load_captioner
from cluster.evaluation.request import CaptionerOptions
from cluster.generation.picture_spec import pin_t2i
from cluster.generation.pinning import clip_spec
from cluster.store.store import open_store
from cluster.weights import node_copy
from cluster.weights.manifest import MANIFEST, WeightsManifest, read_manifest, revision_of
from cluster.weights.node_copy import CACHE_VARIABLE, local_clip, local_generator, local_name, local_spec
from cluster.weights.request import StageModelsRequest
from cluster.weights.stage import stage
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.generation.drawing import Request
from pcm.generation.loading import load_generator
from pcm.generation.seeds import sample_seeds
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.seaweedfs import S3Server
from tests.helpers.stored import file_contents
from tests.helpers.tiny_dataset import write_checkpoint, write_dataset
from tests.helpers.tiny_models import save_tiny_clip

#: Copies what is pinned, and dies of kill -9 when it comes to a function of cluster.weights.node_copy.
FETCH = """
import logging, os, signal, sys
from cluster.weights import node_copy

logging.basicConfig(level=logging.INFO, format="%(message)s")
uri, revision, dies_at = sys.argv[1:]
if dies_at:
    setattr(node_copy, dies_at, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
print(node_copy.local_name(uri, revision))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_one_line(number: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    cache.mkdir()
    said = rf"cache: its disk has no locks \({errno.errorcode[number]}\); .*{CACHE_VARIABLE}"
    with pytest.raises(InputError, match=said), node_copy._locked(cache / "digits", "s3://bucket/model"):
        pass


@pytest.fixture
def place(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A URI of this test's own."""
    return f"{s3.uri}/{request.node.name.partition('[')[0]}/{os.getpid()}"


@pytest.fixture
def staged(place: str, tiny_t2i: Path, cache: Path) -> str:
    stage(StageModelsRequest(t2i=str(tiny_t2i), out=place))
    return place


def fetching(uri: str, revision: str, *, dies_at: str = "") -> AbstractContextManager[subprocess.Popen]:
    return running(
        [sys.executable, "-c", FETCH, uri, revision, dies_at], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_uri_is_pinned_as_the_folder_that_was_staged_and_gives_the_same_seeds(staged: str, tiny_t2i: Path) -> None:
    revision = pin_t2i(staged, None)
    assert revision == pin_t2i(str(tiny_t2i), None)
    specs = [
        DatasetSpec(generator=GeneratorSpec(model=model, revision=revision), clip=ClipSpec(model="null", revision=""))
        for model in (staged, str(tiny_t2i))
    ]
    assert sample_seeds(specs[0], ["a", "b"]) == sample_seeds(specs[1], ["a", "b"])
    assert not specs[0].differences(specs[1])


def test_the_copy_is_the_folder_and_draws_its_pictures(staged: str, tiny_t2i: Path) -> None:
    spec = GeneratorSpec(
        model=staged, revision=pin_t2i(staged, None), num_inference_steps=2, batch_size=2, image_format="png"
    )
    local = local_generator(spec)
    assert file_contents(Path(local.model)) == file_contents(tiny_t2i)
    folder = dataclasses.replace(spec, model=str(tiny_t2i))
    drawn = [load_generator(each).draw([Request(0, "a dog", 7)]) for each in (local, folder)]
    assert drawn[0][0].image and drawn[0][0].image == drawn[1][0].image


def test_a_clip_at_a_uri_gives_the_features_of_its_folder(place: str, tiny_clip: Path, cache: Path) -> None:
    stage(StageModelsRequest(clip=str(tiny_clip), out=place))
    spec = clip_spec(place, device="cpu", dtype="float32")
    assert (spec.model, spec.revision) == (place, clip_spec(str(tiny_clip), device="cpu", dtype="float32").revision)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8))
    features = [
        encoder.encode_images([image]).global_feature
        for encoder in (ClipEncoder.from_spec(local_clip(spec)), ClipEncoder(str(tiny_clip)))
    ]
    np.testing.assert_array_equal(*features)


def test_a_captioner_whose_clip_lies_at_a_uri_takes_no_other_weights_that_are_staged_there(
    tmp_path: Path, tiny_clip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"file://{tmp_path}/clip"
    stage(StageModelsRequest(clip=str(tiny_clip), out=uri))
    spec = clip_spec(uri, device="cpu", dtype="float32")
    checkpoint = write_checkpoint(tmp_path / "run/best", write_dataset(tmp_path / "data", tiny_clip, rows=30))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"clip": spec.identity()}))
    asked = CaptionerOptions(clip=uri, device="cpu")
    copy = local_name(uri)
    with monkeypatch.context() as patched:  # a copy was compared when it was made: it is not read twice
        patched.setattr("pcm.clip.names.folder_revision", lambda path: pytest.fail(f"{path} is read"))
        assert load_captioner([str(checkpoint)], asked).clip.name == copy
    shutil.rmtree(local_name(uri))
    stage(StageModelsRequest(clip=str(save_tiny_clip(tmp_path / "other", seed=5)), out=uri))
    with pytest.raises(InputError, match=f"holds sha256:.*, but {spec.revision} was pinned.*or give another"):
        _ = load_captioner([str(checkpoint)], asked).clip


def test_names_that_are_no_uris_stay_as_they_are() -> None:
    spec = DatasetSpec(
        generator=GeneratorSpec(model="somebody/model", revision="a" * 40),
        clip=ClipSpec(model="hf-hub:somebody/clip", revision="b" * 40),
    )
    assert local_spec(spec) == spec
    assert local_name("/models/own") == "/models/own"


def test_a_second_copy_needs_no_store(staged: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = pin_t2i(staged, None)
    store = open_store(staged)
    for key in store.list():
        store.delete(key)
    assert file_contents(Path(local_name(staged, revision)))
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("harm", ["truncated", "exchanged", "gone"])
def test_a_harmed_object_is_refused_and_mended_by_staging_again(
    staged: str, tiny_t2i: Path, cache: Path, harm: str
) -> None:
    store = open_store(staged)
    manifest = read_manifest(store)
    key = manifest.key(max(manifest.files, key=lambda file: file.size))
    data = store.read_bytes(key)
    store.delete(key)
    if harm != "gone":
        store.write_bytes(key, data[: len(data) // 2] if harm == "truncated" else bytes(len(data)))
    with pytest.raises(InputError, match=r"jobs\.stage_models") as refused:
        local_name(staged, manifest.revision)
    assert key in one_line(refused)
    assert not (cache / manifest.revision.removeprefix("sha256:")).exists()
    store.delete(key) if store.exists(key) else None
    assert stage(StageModelsRequest(t2i=str(tiny_t2i), out=staged))["put"] == 1
    assert file_contents(Path(local_name(staged, manifest.revision))) == file_contents(tiny_t2i)


def test_other_weights_than_pinned_are_refused(place: str, tmp_path: Path, tiny_clip: Path, cache: Path) -> None:
    stage(StageModelsRequest(clip=str(tiny_clip), out=place))
    pinned = read_manifest(open_store(place)).revision
    stage(StageModelsRequest(clip=str(save_tiny_clip(tmp_path / "other", seed=1)), out=place))
    with pytest.raises(InputError, match=pinned) as refused:
        local_name(place, pinned)
    assert "was pinned" in one_line(refused)
    assert local_name(place) != local_name(str(tiny_clip))  # not pinned: what is staged now


def test_two_processes_make_one_copy(staged: str, cache: Path, tiny_t2i: Path) -> None:
    with ExitStack() as stack:
        both = [stack.enter_context(fetching(staged, revision_of(tiny_t2i))) for _ in range(2)]
        said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (folder,) = {out.strip() for out, _ in said}
    assert file_contents(Path(folder)) == file_contents(tiny_t2i)
    assert sum(err.count("fetching") for _, err in said) == 1


@pytest.mark.parametrize("function", ["_make_files", "_copy_piece", "_check", "_complete"])
def test_what_a_killed_process_leaves_is_not_believed(staged: str, cache: Path, tiny_t2i: Path, function: str) -> None:
    with fetching(staged, revision_of(tiny_t2i), dies_at=function) as process:
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    digits = revision_of(tiny_t2i).removeprefix("sha256:")
    assert not (cache / digits).exists()
    assert file_contents(Path(local_name(staged, revision_of(tiny_t2i)))) == file_contents(tiny_t2i)
    assert not (cache / f"{digits}.part").exists()


def test_a_copy_that_was_cut_on_the_disk_is_fetched_again(staged: str, cache: Path, tiny_t2i: Path) -> None:
    folder = Path(local_name(staged, revision_of(tiny_t2i)))
    weights = next(folder.rglob("*.safetensors"))
    os.truncate(weights, 10)
    assert file_contents(Path(local_name(staged, revision_of(tiny_t2i)))) == file_contents(tiny_t2i)


def test_a_copy_of_a_later_release_stays(staged: str, cache: Path, tiny_t2i: Path) -> None:
    """Its processes may have it open."""
    folder = Path(local_name(staged, revision_of(tiny_t2i)))
    manifest = folder.parent / "weights.json"
    manifest.write_bytes(json.dumps(json.loads(manifest.read_bytes()) | {"version": 2}).encode())
    with pytest.raises(InputError, match="of version 2, and this release knows 1"):
        local_name(staged, revision_of(tiny_t2i))
    assert file_contents(folder) == file_contents(tiny_t2i) and json.loads(manifest.read_bytes())["version"] == 2


def test_large_files_come_in_pieces(staged: str, cache: Path, tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copy, "PIECE", 1000)
    assert file_contents(Path(local_name(staged))) == file_contents(tiny_t2i)


def harmful(change: Callable[[dict], object]) -> bytes:
    values: dict = {
        "version": 1, "source": "a", "revision": "sha256:" + "0" * 64,
        "files": {"unet/config.json": {"bytes": 3, "sha256": "sha256:" + "1" * 64}},
    }  # fmt: skip
    change(values)
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{" * 100_000,
        harmful(lambda v: v.update(version=2)),
        harmful(lambda v: v.update(revision="sha256:../../" + "0" * 58)),
        harmful(lambda v: v.update(revision="a" * 40)),
        harmful(lambda v: v["files"].update({"../outside": v["files"]["unet/config.json"]})),
        harmful(lambda v: v["files"].update({"/etc/x": v["files"]["unet/config.json"]})),
        harmful(lambda v: v["files"].update({"unet": v["files"]["unet/config.json"]})),
        harmful(lambda v: v["files"]["unet/config.json"].update(bytes=-1)),
        harmful(lambda v: v["files"]["unet/config.json"].update(sha256="abc")),
        harmful(lambda v: v.update(files=["unet"])),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(InputError) as refused:
        WeightsManifest.from_bytes(data, place="s3://b/weights.json")
    one_line(refused)


def test_a_place_without_weights_says_how_to_stage_some(place: str, cache: Path) -> None:
    with pytest.raises(InputError, match=f"has no {MANIFEST}.*jobs.stage_models --out {place}"):
        pin_t2i(place, None)


def test_python_of_a_staged_folder_is_refused_on_the_copy(
    place: str, tiny_t2i: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(tiny_t2i, tmp_path / "own"))
    index = json.loads((own / "model_index.json").read_text())
    index["unet"] = ["my_unet", "MyUNet"]
    (own / "model_index.json").write_text(json.dumps(index))
    (own / "unet/my_unet.py").write_text("raise SystemExit('executed')")
    with pytest.raises(InputError, match="never run"):
        stage(StageModelsRequest(t2i=str(own), out=place))
    # Somebody else puts it there all the same.
    monkeypatch.setattr("pcm.generation.own_code.refuse_own_code", lambda folder: None)
    stage(StageModelsRequest(t2i=str(own), out=place))
    monkeypatch.undo()
    with pytest.raises(InputError, match="never run"):
        monkeypatch.setenv(CACHE_VARIABLE, str(cache))
        load_generator(local_generator(GeneratorSpec(model=place, revision=revision_of(own), num_inference_steps=1)))


def test_the_cache_is_for_this_user_alone(staged: str, cache: Path) -> None:
    local_name(staged)
    assert cache.stat().st_mode & 0o077 == 0
