"""What a worker is told of its rows before the first step."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.dataset.documents import Plan, Segment, load_manifest
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY
from cluster.dataset.state import state_digest
from cluster.sources.picture_source import PictureSource
from cluster.store.store import open_store
from cluster.training.config import TRAINING_PRESETS
from cluster.training.data.batches import BatchShape
from cluster.training.feed import TrainingData
from cluster.training.request import DataSource
from cluster.training.run_spec import RunSpec
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.vocabulary import Vocabulary
from tests.helpers.tiny_dataset import scene, write_dataset, write_pictures

SHAPE = BatchShape(features=FeatureShape(embed_dim=32, num_patches=16, patch_dim=64), batch_size=2, max_length=10)


def data_of(
    place: Path, *, validation: PictureSource | None = None, clip: Path | None = None, **settings: Any
) -> TrainingData:
    config = dataclasses.replace(TRAINING_PRESETS["embedded"], batch_size=2, **settings)
    key = PLAN_KEY if config.first_epoch == "plan" else MANIFEST_KEY  # as jobs.stream records it
    recorded = [{"sha256": state_digest((place / key).read_bytes())}]
    nothing: dict[str, Any] = {"vocabularies": None, "document": {"datasets": recorded}, "checks": "checks"}
    run = RunSpec(
        data=(DataSource(str(place)),),
        out="out",
        config=config,
        validation=validation,
        clip=str(clip or "embedded"),
        cpu_threads=1,
        device="cpu",
        **nothing,
    )
    vocabulary = Vocabulary.from_text((place / "vocabulary.txt").read_text())
    return TrainingData(run, SHAPE, vocabulary, device=torch.device("cpu"))


def test_a_dataset_so_small_that_nothing_is_held_out_is_refused_before_the_first_step(
    tmp_path: Path, tiny_clip: Path
) -> None:
    place = tmp_path / "data"
    write_dataset(place, tiny_clip, rows=4)
    with pytest.raises(InputError, match=r"of 4 pairs, holdout_fraction=0\.001 leaves none") as caught:
        data_of(place, holdout_fraction=0.001, seed=3).open()
    assert "--val-images" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"of 4 pairs, .* leaves 1 to choose .*, where 2 are needed"):
        data_of(place, holdout_fraction=0.3, seed=5).open()  # of one picture CIDEr is 0, always
    assert "held-out synthetic pairs" in data_of(place, holdout_fraction=0.5, seed=3).open()


def test_held_out_pairs_of_one_caption_are_refused_before_the_first_step(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several pictures of one caption are held out together, and where all references are equal CIDEr is 0, always."""
    captions = ("A red square.", "A blue square.", "A red circle.")
    scenes = [(captions[index % 3], scene(index)[1]) for index in range(9)]
    monkeypatch.setattr("tests.helpers.tiny_dataset.scene", scenes.__getitem__)
    place = write_dataset(tmp_path / "data", tiny_clip, rows=9, shard_size=2)
    with pytest.raises(InputError, match=r"all 3 pairs that holdout_fraction=0\.5 .* are of one caption") as caught:
        data_of(place, holdout_fraction=0.5, seed=1).open()
    assert "--val-images" in str(caught.value) and "\n" not in str(caught.value)
    assert "validation on 6 held-out synthetic pairs" in data_of(place, holdout_fraction=0.5, seed=2).open()


def test_held_out_pairs_are_read_while_the_first_epoch_trains(tmp_path: Path, tiny_clip: Path) -> None:
    """Of a large dataset they lie in a thousand shards: nobody waits for them before the first step."""
    place = write_dataset(tmp_path / "data", tiny_clip, rows=24, shard_size=6, nan_row=5)
    data = data_of(place, holdout_fraction=0.5, seed=3)
    data.open()
    with pytest.raises(InputError, match="of sample 000000005-00"):
        assert data.validation
    with pytest.raises(InputError, match="of sample 000000005-00"):  # not after the whole epoch
        next(data.batches(0, start_step=0))


def test_validation_pictures_that_cannot_be_read_are_told_of_before_the_first_step(
    tmp_path: Path, tiny_clip: Path
) -> None:
    place = write_dataset(tmp_path / "data", tiny_clip, rows=4)
    pictures = write_pictures(tmp_path / "pictures", count=2)
    source = PictureSource(images=str(pictures), references=str(tmp_path / "references.csv"))
    assert "validation on" in data_of(place, validation=source, clip=tiny_clip).open()
    for left, name in (("1", "scene1000.png"), ("none", "scene1001.png")):
        (pictures / name).write_bytes(b"no picture")
        with pytest.raises(InputError, match=rf"{left} of its pictures can be read, .*scene1000\.png") as caught:
            data_of(place, validation=source, clip=tiny_clip).open()
        assert "\n" not in str(caught.value)


def test_validation_pictures_that_have_the_same_references_are_refused_before_the_first_step(
    tmp_path: Path, tiny_clip: Path
) -> None:
    place = write_dataset(tmp_path / "data", tiny_clip, rows=4)
    pictures = write_pictures(tmp_path / "pictures", count=2)
    references = tmp_path / "references.csv"
    references.write_text("image,caption\nscene1000.png,A cat.\nscene1001.png,A cat.\n")
    source = PictureSource(images=str(pictures), references=str(references))
    with pytest.raises(InputError, match="all 2 pictures have the same references") as caught:
        data_of(place, validation=source, clip=tiny_clip).open()
    assert "\n" not in str(caught.value)


def test_a_group_that_starts_again_does_not_train_on_other_data(tmp_path: Path, tiny_clip: Path) -> None:
    """Days after the driver has looked: a corpus has grown meanwhile, or what was quarantined was tried again."""
    place = write_dataset(tmp_path / "data", tiny_clip, rows=24, shard_size=6)
    data = data_of(place, holdout_fraction=0.5)
    data.open()
    shutil.rmtree(place)
    write_dataset(place, tiny_clip, rows=48, shard_size=6)
    with pytest.raises(InputError, match=r"data: has changed since this run began .*another --out") as caught:
        data.open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("known_by", [PLAN_KEY, MANIFEST_KEY])
def test_a_first_epoch_in_the_order_of_a_plan_does_not_go_on_with_another(
    tmp_path: Path, tiny_clip: Path, known_by: str
) -> None:
    """jobs.stream knows it by its plan, jobs.train by its manifest, which stays until the grown dataset is finished."""
    place = write_dataset(tmp_path / "data", tiny_clip, rows=24, shard_size=6)
    plan = plan_of(place)
    (place / PLAN_KEY).write_bytes(plan.to_json())
    recorded = {"datasets": [{"sha256": state_digest((place / known_by).read_bytes())}]}
    run = dataclasses.replace(data_of(place, first_epoch="plan", holdout_fraction=0.5)._run, document=recorded)

    def started() -> TrainingData:
        vocabulary = Vocabulary.from_text((place / "vocabulary.txt").read_text())
        return TrainingData(run, SHAPE, vocabulary, device=torch.device("cpu"))

    begun = started()
    begun.open()
    (place / PLAN_KEY).write_bytes(dataclasses.replace(plan, corpus_fingerprint="of more captions").to_json())
    with pytest.raises(InputError, match="data: has changed since this run began"):
        started()
    with pytest.raises(InputError, match="data: has changed since this run began"):
        begun.open()


def plan_of(place: Path) -> Plan:
    """Such as a finished dataset may have been made by, in one go."""
    manifest = load_manifest(open_store(place))
    rows, fingerprint = manifest.expected, manifest.corpus_fingerprint
    return Plan(
        spec=manifest.spec,
        corpus=manifest.corpus,
        corpus_fingerprint=fingerprint,
        records=rows,
        expected=rows,
        usable=rows,
        shard_size=6,
        segments=(Segment(0, rows, 0, len(manifest.shards), fingerprint),),
    )
