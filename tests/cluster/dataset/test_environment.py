"""dataset.json of what is derived or imported says by which releases, and on which machine, and the same each time."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import pcm
from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.curation.sync.sentences import SentenceSpec
from cluster.dataset.documents import load_manifest
from cluster.dataset.environment import (
    differences,
    environment,
    store_environment,
    versions,
    warn_of_other_releases,
)
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, shard_key
from cluster.export.as_dataset import export_as_dataset
from cluster.export.export import export_dataset
from cluster.export.request import ExportRequest
from cluster.ingest.photos import featurise_photos
from cluster.ingest.published import import_dataset
from cluster.ingest.request import FeaturiseRequest, ImportRequest
from cluster.ingest.text_only import text_only_dataset
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from tests.helpers.featurised import featurise_in_process
from tests.helpers.published import make_complete_dataset
from tests.helpers.refined import redraw_in_process, sync_in_process
from tests.helpers.tiny_dataset import write_dataset, write_pictures
from tests.helpers.tiny_models import save_tiny_clip


def _curated(data: Path, out: Path, clip: Path) -> None:
    curate(CurateRequest(data=(str(data),), out=str(out), min_words=2))


def _materialised(data: Path, out: Path, clip: Path) -> None:
    curate(CurateRequest(data=(str(data),), out=str(out), min_words=2, materialise=True))


def _exported(data: Path, out: Path, clip: Path) -> None:
    view = out.with_suffix(".view")
    _curated(data, view, clip)
    request = ExportRequest(data=str(view), out=str(out), to="dataset")
    export_as_dataset(open_store(view), open_store(out), request)


def _refined(data: Path, out: Path, clip: Path) -> None:
    sync_in_process(data, out, SentenceSpec(model="clip"))


def _redrawn(data: Path, out: Path, clip: Path) -> None:
    redraw_in_process(data, out, method="redraw", budget=2, rounds=1)


def _featurised(data: Path, out: Path, clip: Path) -> None:
    featurise_in_process(data, out, clip)


def _photos(data: Path, out: Path, clip: Path) -> None:
    pictures = write_pictures(out.with_suffix(".photos") / "pictures", count=3)
    captions = str(pictures.parent / "references.csv")
    featurise_photos(FeaturiseRequest(images=str(pictures), captions=captions, out=str(out), clip=str(clip)))


def _texts(data: Path, out: Path, clip: Path) -> None:
    text_only_dataset(open_store(data), open_store(out), ClipEncoder(load_manifest(open_store(data)).spec.clip.model))


@pytest.mark.parametrize(
    ("make", "encodes"),
    [
        (_curated, False),
        (_materialised, False),
        (_exported, False),
        (_redrawn, False),
        (_refined, True),
        (_featurised, True),
        (_photos, True),
        (_texts, True),
    ],
)
def test_a_manifest_says_what_made_it(
    tmp_path: Path, tiny_clip: Path, make: Callable[[Path, Path, Path], None], encodes: bool
) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=12)
    other = save_tiny_clip(tmp_path / "clip", seed=1)
    documents = []
    for name in ("once", "again"):
        make(data, tmp_path / name, other)
        found = load_manifest(open_store(tmp_path / name))
        assert found.versions == versions() and found.versions["pcmnet-ray"] == pcm.__version__
        (environment,) = found.environments
        assert environment["processor"] and (environment["instructions"] is not None) == encodes
        documents.append((tmp_path / name / MANIFEST_KEY).read_text().replace(f"{tmp_path / name}", "OUT"))
    assert make in (_exported, _photos) or documents[0] == documents[1], "the same bytes"


@pytest.mark.parametrize("features", [True, False])
def test_a_rerun_on_another_machine_leaves_a_complete_import_as_it_is(
    tmp_path: Path, tiny_t2i: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, features: bool
) -> None:
    drawn, _, _ = make_complete_dataset(tmp_path / "data", t2i=tiny_t2i, clip=tiny_clip)
    files = tmp_path / "official"
    export_dataset(
        drawn, open_store(files), ExportRequest(data="it", out="there", to="official", name="sd", max_length=12)
    )
    request = ImportRequest(
        annotations=f"{files}/mscoco_caption_anno_train.pkl", images=f"{files}/images/sd_sp{{split_id}}",
        features=f"{files}/features/sd_sp{{split_id}}" if features else None, vocabulary=f"{files}/vocabulary.txt",
        concepts=f"{files}/concepts.pickle", clip_head=f"{files}/clip_head.pth", clip=str(tiny_clip),
        out=str(tmp_path / "out"), shard_size=3, workers=2,
    )  # fmt: skip
    assert_stays(tmp_path / "out", lambda: import_dataset(request), monkeypatch)
    monkeypatch.setattr("pcm.clip.encoder.ClipEncoder.from_spec", None)  # which would be a TypeError
    monkeypatch.setattr("cluster.ingest.published.FeaturiseShard", None)
    for asked in (request, replace(request, concepts=None, clip_head=None)):
        assert import_dataset(asked).skipped == load_manifest(open_store(tmp_path / "out")).expected


def test_a_rerun_on_another_machine_leaves_complete_photos_as_they_are(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_stays(tmp_path / "out", lambda: _photos(tmp_path, tmp_path / "out", tiny_clip), monkeypatch)


def test_clip_and_its_gpu_are_needed_only_where_something_is_missing(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pictures = write_pictures(tmp_path / "pictures", count=3)
    request = FeaturiseRequest(
        images=str(pictures), captions=str(tmp_path / "references.csv"), out=str(tmp_path / "out"), clip=str(tiny_clip)
    )
    on_gpu = replace(request, device="cuda", dtype="float32")
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU on this machine; run the job on a machine"):
        featurise_photos(on_gpu)
    assert not (tmp_path / "out").exists()
    featurise_photos(request)
    plan = tmp_path / "out" / PLAN_KEY
    document = json.loads(plan.read_text())
    document["spec"]["clip"]["device"] = "cuda"  # as if it were begun on a GPU
    plan.write_text(json.dumps(document))
    with pytest.raises(InputError, match="and this is cpu; give --device cuda where there is a GPU, or another"):
        featurise_photos(replace(request, device="cpu"))
    again = featurise_photos(on_gpu)
    assert again.skipped == again.manifest.expected > 0
    (tmp_path / "out" / shard_key(0)).unlink()
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU on this machine"):
        featurise_photos(on_gpu)


def test_a_gpu_that_is_slow_in_bfloat16_is_named_before_a_dataset_is_begun(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = write_pictures(tmp_path / "pictures", count=3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    request = FeaturiseRequest(
        images=str(pictures), captions=str(tmp_path / "references.csv"), out=str(tmp_path / "out"), clip=str(tiny_clip),
        device="cuda",
    )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        with contextlib.suppress(Exception):  # there is no GPU for CLIP
            featurise_photos(replace(request, out=str(tmp_path / dtype), dtype=dtype))
        said = [message for message in caplog.messages if "bfloat16" in message]
        assert [message.startswith("Tesla T4: has no bfloat16 of its own") for message in said] == (
            [True] if dtype == "bfloat16" else []
        )


def assert_stays(out: Path, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Called once more with another processor and another release."""
    make()
    before = (out / MANIFEST_KEY).read_bytes()
    monkeypatch.setattr("cluster.dataset.environment.processor", lambda: "another CPU")
    monkeypatch.setattr("pcm.__version__", "9.9")
    make()
    assert (out / MANIFEST_KEY).read_bytes() == before
    (out / MANIFEST_KEY).write_bytes(b"{")
    make()
    assert load_manifest(open_store(out)).expected


def test_a_dataset_that_goes_on_with_other_releases_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A release of ours that recorded fewer packages, or another of ours, is none of those."""
    store = open_store(tmp_path)
    warn_of_other_releases(store)
    now = environment(device="cpu", loads_models=False)
    few = {name: now["versions"][name] for name in ("torch", "diffusers")}
    store_environment(store, {**now, "versions": {**few, "pcmnet-ray": "0.0.1"}})
    warn_of_other_releases(store)
    assert not caplog.text
    for digest in store.list("environments"):
        store.delete(digest)
    store_environment(store, {**now, "versions": {**now["versions"], "torch": "1.0"}})
    warn_of_other_releases(store)
    assert (
        f"goes on with other releases than it was begun with (torch: 1.0 -> {few['torch'].partition('+')[0]})"
        in caplog.text
    )
    caplog.clear()
    other_build = {"torch": f"{few['torch'].partition('+')[0]}+cu999"}
    store_environment(store, {**now, "versions": {**now["versions"], **other_build}})
    warn_of_other_releases(store)
    assert not caplog.text


def test_what_differs_is_of_what_both_have_recorded() -> None:
    before = {"versions": {"torch": "1.0"}, "processor": "a", "gpu": None}
    now = {"versions": {"torch": "1.0", "peft": "0.22"}, "processor": "a", "gpu": None}
    assert differences([before], now) == []
    assert differences([before], {**now, "gpu": "H200"}) == ["gpu: None -> H200"]
    assert differences([{**before, "versions": {"peft": "0.21"}}], now) == ["peft: 0.21 -> 0.22"]
