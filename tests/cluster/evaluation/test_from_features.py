"""Evaluation and captions from features alone: published files or our shards, without photos and without a CLIP."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.dataset.given_features import FeatureSet, load_feature_set
from cluster.evaluation.caption import caption
from cluster.evaluation.captioners import epoch_checkpoints
from cluster.evaluation.captioning import caption_pictures
from cluster.evaluation.evaluate import _matched, evaluate, read_results
from cluster.evaluation.request import CaptionRequest, EvaluateRequest
from cluster.export.export import export
from cluster.export.request import ExportRequest
from cluster.ingest.published import import_official
from cluster.ingest.request import ImportRequest
from cluster.sources.picture_source import FeatureSource
from cluster.sources.pictures import PictureSource, load_picture_set
from pcm.captioners.captioner import Captioner, CaptionResult
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.errors import InputError
from pcm.official.files import features_to_npz
from pcm.text.metrics import COCO_METRICS, cider_only
from pcm.text.references import load_references
from tests.helpers.tiny_dataset import TINY, scene, write_checkpoint, write_dataset, write_pictures

COUNT = 7
#: What a published file does not show of the tiny network.
SETTINGS_OF_TINY = {name: TINY[name] for name in ("num_heads", "max_length")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """data/, checkpoint/ and one without its CLIP; pictures/, and img/ with features of the same by their ids."""
    folder = tmp_path_factory.mktemp("features")
    write_checkpoint(folder / "checkpoint", write_dataset(folder / "data", tiny_clip, rows=30))
    pictures = write_pictures(folder / "pictures", count=COUNT)
    encoder = ClipEncoder(str(tiny_clip), exact=False)
    encoded = encoder.encode_images([scene(int(path.stem[5:]))[1] for path in sorted(pictures.glob("*.png"))])
    (folder / "img").mkdir()
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        npz = features_to_npz(encoded.patch_features[number], encoded.global_feature[number])
        (folder / "img" / f"{path.stem}.npz").write_bytes(npz)
    shutil.copytree(folder / "checkpoint", folder / "no-clip")
    document = json.loads((folder / "no-clip" / "config.json").read_text())
    document["clip"]["model"] = "ViT-L-14/openai"  # whose weights are not here, nor can they be had
    document["clip"]["activation"] = "quick_gelu"
    (folder / "no-clip" / "config.json").write_text(json.dumps(document))
    return folder


def asked(world: Path, **values: object) -> EvaluateRequest:
    settings = {"checkpoint": str(world / "no-clip"), "references": str(world / "references.csv"), "device": "cpu"}
    return EvaluateRequest(**{**settings, **values})  # type: ignore[arg-type]


def test_published_features_give_the_captions_and_metrics_of_their_pictures(
    world: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint": str(world / "checkpoint")}
    features, clip = str(world / "img"), str(tiny_clip)
    by_features = evaluate(asked(world, features=features, clip=clip, out=str(tmp_path / "features"), **settings))
    by_pictures = evaluate(asked(world, images=str(world / "pictures"), out=str(tmp_path / "pictures"), **settings))
    assert by_features["n"] == COUNT and by_features["unreadable"] == 0
    assert {name: by_features[name] for name in COCO_METRICS} == {name: by_pictures[name] for name in COCO_METRICS}
    assert by_features["CLIPScore"] == pytest.approx(by_pictures["CLIPScore"], abs=1e-6)
    captions = [
        [row["caption"] for row in json.loads((tmp_path / name / "captions.json").read_text())]
        for name in ("features", "pictures")
    ]
    assert captions[0] == captions[1]


def loaded(world: Path, features: Path, *, references: bool = True, limit: int | None = None) -> FeatureSet:
    found = str(world / "references.csv") if references else None
    return load_feature_set(FeatureSource(images=str(features), references=found), limit=limit)


def test_damaged_features_and_those_of_another_clip_are_left_out_and_named(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "img", tmp_path / "img")
    names = sorted(path.name for path in (tmp_path / "img").iterdir())
    (tmp_path / "img" / names[0]).write_bytes(b"no archive")
    (tmp_path / "img" / names[1]).write_bytes(features_to_npz(np.ones((3, 5)), np.ones(4)))
    captioner = Captioner.load(world / "no-clip", device="cpu")
    found = caption_pictures(captioner, loaded(world, tmp_path / "img"))
    assert len(found.captions) == COUNT - 2 and list(found.unreadable) == ["scene1000.png", "scene1001.png"]
    assert "not a readable npz" in found.unreadable["scene1000.png"]
    assert "give features of the CLIP that it was trained with" in found.unreadable["scene1001.png"]
    for name in names[2:]:
        (tmp_path / "img" / name).unlink()
    with pytest.raises(InputError, match="none of its 2 pictures can be read"):
        evaluate(asked(world, features=str(tmp_path / "img")))


def test_a_dataset_is_features_and_its_captions_are_references(world: Path) -> None:
    given = loaded(world, world / "data", references=False, limit=5)
    assert list(given.references) == [f"{number:09d}-00" for number in range(5)]
    assert given.references["000000003-00"] == [scene(3)[0]]
    settings = {"checkpoint": str(world / "no-clip"), "features": str(world / "data"), "limit": 5, "device": "cpu"}
    found = caption(CaptionRequest(**settings))
    assert list(found["captions"]) == list(given.references) and not found["errors"]


def test_rows_of_a_dataset_whose_features_are_no_numbers_are_left_out_and_named(
    world: Path, tmp_path: Path, tiny_clip: Path
) -> None:
    write_dataset(tmp_path / "nan", tiny_clip, rows=8, nan_row=2, nan_global_row=5)
    captioner = Captioner.load(world / "no-clip", device="cpu")
    found = caption_pictures(captioner, loaded(world, tmp_path / "nan", references=False))
    assert len(found.captions) == 6 and len(found.global_feature) == 6 and np.isfinite(found.global_feature).all()
    assert list(found.unreadable) == ["000000002-00", "000000005-00"]
    assert all(why.endswith("features that are not finite, or zero") for why in found.unreadable.values())
    request = CaptionRequest(checkpoint=str(world / "no-clip"), features=str(tmp_path / "nan"), device="cpu")
    assert list(caption(request)["errors"]) == list(found.unreadable)


def test_features_of_another_clip_than_the_captioners_are_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    manifest["spec"]["clip"]["activation"] = "gelu"
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is gelu, the captioner was trained with quick_gelu"):
        evaluate(asked(world, features=str(tmp_path / "data"), references=None))


def test_a_uri_where_no_clip_is_staged_is_told_before_anything_is_captioned(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Captioner, "describe", lambda *_: pytest.fail("it captions"))
    with pytest.raises(InputError, match="no weights are staged there"):
        evaluate(asked(world, features=str(world / "img"), clip=f"file://{tmp_path}/clip"))


def test_captions_go_into_a_results_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.json"
    request = CaptionRequest(checkpoint=str(world / "no-clip"), features=str(world / "img"), out=str(out), device="cpu")
    summary = caption(request)
    assert summary == {"captions": str(out), "n": COUNT, "errors": {}}
    references = load_references(world / "references.csv").by_image
    assert len(_matched(read_results(out.read_bytes(), source="captions"), references, {}, source="captions")) == COUNT
    assert all(row["concepts"] for row in json.loads(out.read_text()))


def test_concepts_of_a_file_are_those_that_are_found(world: Path, tmp_path: Path, tiny_clip: Path) -> None:
    from pcm.official.files import concepts_to_pickle
    from pcm.text.concepts import ConceptVocabulary

    names = ("square", "circle", "bar", "red", "green", "sea", "sky")
    texts = ClipEncoder(str(tiny_clip)).encode_texts(list(names))
    (tmp_path / "coco.pickle").write_bytes(concepts_to_pickle(ConceptVocabulary(names, texts)))
    settings = {"checkpoint": str(world / "checkpoint"), "features": str(world / "img"), "device": "cpu"}
    found = caption(CaptionRequest(**settings, concepts=str(tmp_path / "coco.pickle")))
    assert {name for concepts in found["concepts"].values() for name, _ in concepts} <= set(names)
    own = caption(CaptionRequest(**settings))
    assert found["concepts"] != own["concepts"]


def test_an_ensemble_of_one_captioner_twice_says_what_it_says_alone(world: Path, tmp_path: Path) -> None:
    settings = {"features": str(world / "img"), "device": "cpu"}
    alone = caption(CaptionRequest(checkpoint=str(world / "checkpoint"), **settings))
    twice = caption(CaptionRequest(checkpoint=(str(world / "checkpoint"), str(world / "checkpoint")), **settings))
    assert twice["captions"] == alone["captions"]
    shutil.copytree(world / "checkpoint", tmp_path / "other")
    words = (tmp_path / "other" / "vocabulary.txt").read_text().splitlines()
    (tmp_path / "other" / "vocabulary.txt").write_text("\n".join(["unheard", *words[1:]]) + "\n")
    with pytest.raises(InputError, match="another vocabulary than"):
        caption(CaptionRequest(checkpoint=(str(world / "checkpoint"), str(tmp_path / "other")), **settings))


def write_epoch(world: Path, run: Path, name: str) -> Path:
    """A checkpoint of a run, as far as evaluation looks at it."""
    folder = shutil.copytree(world / "checkpoint", run / "checkpoints" / name)
    (folder / "state.json").write_text("{}")
    return folder


def test_an_epoch_whose_checkpoint_is_damaged_costs_that_epoch_alone(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for name in ("epoch-001", "epoch-002", "epoch-002-again", "epoch-003", "epoch-003-again", "epoch-004"):
        write_epoch(world, run, name)
    (run / "checkpoints" / "epoch-001" / "model.safetensors").write_bytes(b"cut")
    (run / "checkpoints" / "epoch-003-again" / "state.json").unlink()  # killed while it was written
    (run / "checkpoints" / "epoch-004" / "concepts.safetensors").unlink()
    (run / "metrics.jsonl").write_text("{}\n" * 4)
    chosen = {epoch: Path(place).name for epoch, place in epoch_checkpoints(str(run))[0].items()}
    assert chosen == {1: "epoch-001", 2: "epoch-002-again", 3: "epoch-003"}
    epochs = asked(world, checkpoint=str(run), features=str(world / "img"), every_epoch=True)
    summary = evaluate(epochs)
    assert [row["epoch"] for row in summary["epochs"]] == [2, 3] and summary["not_kept"] == [4]
    assert list(summary["damaged"]) == ["1"] and "epoch 1: left out, its checkpoint cannot be loaded" in caplog.text
    for name in ("epoch-002-again", "epoch-003"):
        (run / "checkpoints" / name / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit"):
        evaluate(epochs)


def test_every_epoch_that_the_run_kept_is_evaluated(world: Path, tmp_path: Path) -> None:
    for name in ("epoch-002", "epoch-002-step-000000040", "epoch-003"):
        write_epoch(world, tmp_path / "run", name)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n" * 3)
    assert list(epoch_checkpoints(str(tmp_path / "run"))[0]) == [2, 3]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch-003")
    (tmp_path / "out").mkdir()
    for name in ("metrics.json", "captions.json"):  # of an earlier evaluation of one checkpoint
        (tmp_path / "out" / name).write_text("{}")
    summary = evaluate(
        asked(
            world,
            checkpoint=str(tmp_path / "run"),
            features=str(world / "img"),
            every_epoch=True,
            out=str(tmp_path / "out"),
        )
    )
    assert [row["epoch"] for row in summary["epochs"]] == [2] and summary["not_kept"] == [1, 3]
    assert summary["best"] == summary["epochs"][0] and summary["best"]["n"] == COUNT
    assert summary["best"]["CLIPScore"] is None and "name it with --clip" in summary["best"]["reasons"]["CLIPScore"]
    assert (tmp_path / "out" / "epoch-002" / "captions.json").is_file()
    assert json.loads((tmp_path / "out" / "epochs.json").read_text())["metrics"]["not_kept"] == [1, 3]
    assert not (tmp_path / "out" / "metrics.json").exists()  # which jobs.report would take for one evaluation
    assert not (tmp_path / "out" / "captions.json").exists()
    with pytest.raises(InputError, match="has no checkpoints of epochs"):
        evaluate(asked(world, features=str(world / "img"), every_epoch=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--images, --features: give one of the two"),
        ({"images": "a", "features": "b"}, "--images, --features: give one of the two"),
        ({"results": "r.json", "checkpoint": None, "features": "b"}, "--features b: without effect beside --results"),
        ({"features": "b", "references": None, "split": "test"}, "--split test: needs --references"),
        ({"features": "b", "every_epoch": True, "checkpoint": ("a", "b")}, "takes one run"),
    ],
)
def test_options_that_do_not_go_together_are_refused(world: Path, values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(world, **values)


def test_a_captioner_is_loaded_without_its_clip_and_asks_for_it_with_the_first_picture(world: Path) -> None:
    captioner = Captioner.load(world / "no-clip", device="cpu")
    rows = captioner.features
    features = ImageFeatures(
        np.ones((1, rows.embed_dim), np.float32) / rows.embed_dim**0.5,
        np.ones((1, rows.num_patches, rows.patch_dim), np.float32),
    )
    assert len(captioner.describe(features)) == 1
    assert not isinstance(captioner._clip, ClipEncoder)


def test_the_published_files_alone_give_the_captions_and_cider_of_our_own(world: Path, tmp_path: Path) -> None:
    """What a release holds - .pth, vocabulary, concepts, .npz - without photos and CLIP, against our own files."""
    release = tmp_path / "release"
    export(ExportRequest(checkpoint=str(world / "checkpoint"), to="official", out=str(release)))
    import_official(
        ImportRequest(
            checkpoint=str(release / "model.pth"), vocabulary=str(release / "vocabulary.txt"),
            concepts=str(release / "concepts.pickle"), clip="ViT-L-14/openai", out=str(tmp_path / "imported"),
            settings=SETTINGS_OF_TINY,
        )
    )  # fmt: skip
    given = loaded(world, world / "img")
    pictures = load_picture_set(PictureSource(images=str(world / "pictures"), references=str(world / "references.csv")))
    ours = caption_pictures(Captioner.load(world / "checkpoint", device="cpu"), pictures)
    published = caption_pictures(Captioner.load(tmp_path / "imported", device="cpu"), given)
    assert published.captions == ours.captions and len(ours.captions) == COUNT
    np.testing.assert_array_equal(published.global_feature, ours.global_feature)
    assert cider_only(published.captions, given.references) == cider_only(ours.captions, pictures.references)


def test_too_little_memory_is_one_line_that_says_what_helps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(captioner: Captioner, features: ImageFeatures) -> list[CaptionResult]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Captioner, "describe", describe)
    features, checkpoint = str(world / "img"), str(world / "no-clip")
    for run in (
        lambda: evaluate(asked(world, features=features, out=str(tmp_path / "out"))),
        lambda: caption(CaptionRequest(features=features, checkpoint=(checkpoint,), device="cpu")),
    ):
        with pytest.raises(
            InputError,
            match=r"^out of memory \(.*GiB\) while .* captioned; give a smaller --beam-size, or --device cpu",
        ):
            run()
