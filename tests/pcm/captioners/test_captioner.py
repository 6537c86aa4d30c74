"""Captions of picture files, good and bad."""

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.shrunk_clips import shrunk
from pcm.captioners.captioner import Captioner, checkpoint_folder, decode_captions
from pcm.captioners.interface import CONCEPTS_FILE, CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE, Decoded
from pcm.captioners.methods import METHODS
from pcm.captioners.pcmnet.decoding import greedy_search
from pcm.captioners.pcmnet.method import PCMNetMethod
from pcm.clip.names import folder_revision
from pcm.errors import InputError
from pcm.images import MAX_PIXELS
from tests.helpers.png_header import png_header
from tests.helpers.tiny_dataset import png, scene, write_checkpoint, write_dataset
from tests.helpers.tiny_models import save_tiny_clip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    return write_checkpoint(folder / "best", write_dataset(folder / "data", tiny_clip, rows=30))


@pytest.fixture(scope="module")
def captioner(checkpoint: Path) -> Captioner:
    return Captioner.load(checkpoint, device="cpu")


class SaysNothing(PCMNetMethod):
    """Another method: its captions end at once, and it finds no concepts."""

    name = "nothing"
    files = tuple(name for name in PCMNetMethod.files if name != VOCABULARY_FILE)

    def decode(self, network: Any, global_feature: torch.Tensor, *_: Any, **__: Any) -> Decoded:
        ids = torch.zeros(len(global_feature), 3, dtype=torch.int64)
        return Decoded(ids, torch.full(ids.shape, -0.5))

    def salient(self, network: Any, global_feature: torch.Tensor, patch_features: torch.Tensor) -> list:
        return [[] for _ in global_feature]


def test_a_checkpoint_is_read_and_decoded_by_the_method_that_it_names(
    captioner: Captioner, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, SaysNothing.name, SaysNothing())
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    document = json.loads((other / CONFIG_FILE).read_text())
    (other / CONFIG_FILE).write_text(json.dumps(document | {"captioner": SaysNothing.name}))
    (found,) = Captioner.load(other, clip=document["clip"]["model"], device="cpu").caption([scene(0)[1]])
    assert (found.caption, found.log_prob, found.concepts, found.error) == (".", -0.5, (), "")
    assert captioner.caption([scene(0)[1]])[0].log_prob != -0.5
    (other / VOCABULARY_FILE).unlink()
    assert checkpoint_folder(other) == other
    (other / CONFIG_FILE).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"vocabulary\.txt missing; give a complete checkpoint folder"):
        checkpoint_folder(other)


def test_bad_files_get_one_line_and_the_others_are_captioned(captioner: Captioner, tmp_path: Path) -> None:
    good = [tmp_path / f"good{i}.png" for i in range(2)]
    for i, path in enumerate(good):
        path.write_bytes(png(scene(i)[1]))
    buffer = io.BytesIO()
    scene(3)[1].resize((200, 200)).save(buffer, "JPEG")
    bad = {
        "empty.jpg": b"",
        "text.png": b"this is no picture",
        "truncated.jpg": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "bomb.png": png_header(MAX_PIXELS // 1000 + 1, 1000),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    paths = [good[0], *(tmp_path / name for name in bad), tmp_path / "missing.jpg", good[1]]
    results = captioner.caption(paths)
    assert [bool(result.error) for result in results] == [False, True, True, True, True, True, False]
    for path, result in zip(paths, results, strict=True):
        if result.error:
            assert path.name in result.error and "\n" not in result.error
            assert result.caption == "" and result.concepts == ()
        else:
            assert result.caption and np.isfinite(result.log_prob)
    assert f"{MAX_PIXELS:,}" in results[4].error


def test_a_picture_that_is_given_alone_is_one_and_what_is_none_is_told(captioner: Captioner, tmp_path: Path) -> None:
    path = tmp_path / "good.png"
    path.write_bytes(png(scene(1)[1]))

    class Place:
        def __fspath__(self) -> str:
            return str(path)

    with path.open("rb") as opened:
        alike: list[Any] = [str(path), path, Image.open(path), path.read_bytes(), io.BytesIO(path.read_bytes()), opened]
        for alone in (*alike, Place()):
            (result,) = captioner.caption(alone)
            assert result.caption and not result.error
            assert not opened.closed
    given: Any = [np.zeros((4, 4, 3)), path, 7]
    first, second, third = captioner.caption(given)
    assert (first.error, third.error) == tuple(
        f"picture {number} is a {kind}; give a PIL picture, a path, bytes or an opened file"
        for number, kind in ((0, "ndarray"), (2, "int"))
    )
    assert second.caption and not second.error


def test_a_picture_is_captioned_alike_alone_and_among_others(captioner: Captioner) -> None:
    pictures = [scene(i)[1] for i in range(5)]
    together = captioner.caption(pictures)
    alone = [captioner.caption([picture])[0] for picture in pictures]
    assert [result.caption for result in together] == [result.caption for result in alone]
    np.testing.assert_allclose([r.log_prob for r in together], [r.log_prob for r in alone], rtol=1e-4)


def test_concepts_are_the_most_probable_of_the_softmax_over_the_vocabulary(captioner: Captioner) -> None:
    picture = scene(4)[1]
    (result,) = captioner.caption([picture])
    image = captioner.clip.encode_images([picture]).global_feature[0]
    logits = captioner.concepts.embeddings @ image / 0.01
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)[: captioner.model.config.top_concepts]
    expected = [(captioner.concepts.names[i], probabilities[i]) for i in order if probabilities[i] > 0]
    assert [name for name, _ in result.concepts] == [name for name, _ in expected]
    np.testing.assert_allclose([p for _, p in result.concepts], [p for _, p in expected], rtol=1e-3, atol=1e-7)


def test_beam_size_one_is_greedy_search(captioner: Captioner) -> None:
    features = captioner.clip.encode_images([scene(i)[1] for i in range(3)])
    decoded = decode_captions(
        captioner.model, captioner.vocabulary, features.global_feature, features.patch_features, beam_size=1
    )
    found = greedy_search(
        captioner.model, torch.from_numpy(features.global_feature), torch.from_numpy(features.patch_features)
    )
    assert [caption for caption, _ in decoded] == [captioner.vocabulary.decode(ids) for ids in found.token_ids.tolist()]


def test_the_score_of_greedy_search_is_of_the_words_and_the_end_whatever_the_neighbours(captioner: Captioner) -> None:
    shape, random = captioner.features, np.random.default_rng(0)
    arrays = (
        random.normal(size=(8, shape.embed_dim)).astype(np.float32),
        3 * random.normal(size=(8, shape.num_patches, shape.patch_dim)).astype(np.float32),
    )

    def decoded(rows: slice) -> list[tuple[str, float]]:
        return decode_captions(captioner.model, captioner.vocabulary, *(each[rows] for each in arrays), beam_size=1)

    together = decoded(slice(None))
    assert len({len(caption.split()) for caption, _ in together}) > 2  # some end long before the last
    alone = [decoded(slice(row, row + 1))[0] for row in range(8)]
    assert [caption for caption, _ in together] == [caption for caption, _ in alone]
    np.testing.assert_allclose([score for _, score in together], [score for _, score in alone], rtol=1e-4)


def test_pictures_of_other_modes_and_sizes_are_captioned(captioner: Captioner) -> None:
    pictures = [Image.new(mode, size) for mode, size in (("L", (5, 400)), ("RGBA", (64, 64)), ("P", (33, 1)))]
    assert all(result.caption and not result.error for result in captioner.caption(pictures))


def test_no_pictures_give_no_results(captioner: Captioner) -> None:
    assert captioner.caption([]) == []


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_a_captioner_of_a_gpu_reads_pictures_in_float32_on_a_cpu(
    device: str, dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(checkpoint.parent, tmp_path / "run")
    document = json.loads((run / "best" / CONFIG_FILE).read_text())
    document["clip"]["dtype"] = "bfloat16"
    (run / "best" / CONFIG_FILE).write_text(json.dumps(document))
    seen: dict[str, Any] = {}

    class Loaded(Exception):
        """As far as it matters here."""

    def encoder(place: str, **settings: Any) -> None:
        seen.update(settings)
        raise Loaded

    monkeypatch.setattr(
        "pcm.captioners.captioner.ClipEncoder.__init__", lambda self, *args, **named: encoder(*args, **named)
    )
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # there may be no GPU
    with pytest.raises(Loaded):
        _ = Captioner.load(run / "best", device=device).clip
    assert (seen["device"], seen["dtype"]) == (device, dtype)


def test_a_run_folder_means_its_best_checkpoint(checkpoint: Path) -> None:
    assert checkpoint_folder(checkpoint.parent) == checkpoint_folder(checkpoint) == checkpoint


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model\.safetensors in it or in its best/"):
        Captioner.load(tmp_path)


def test_every_method_has_the_file_by_which_its_checkpoints_are_found() -> None:
    for method in METHODS.values():
        assert {MODEL_FILE, CONFIG_FILE, VOCABULARY_FILE, CONCEPTS_FILE} <= set(method.files)


def test_a_checkpoint_with_a_missing_file_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "vocabulary.txt":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"vocabulary\.txt missing"):
        Captioner.load(tmp_path)


def test_weights_of_another_network_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tmp_path / "config.json").read_text())
    document["model"]["intermediate_size"] = 96
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit its config\.json"):
        Captioner.load(tmp_path)


def changed_config(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the checkpoint whose config.json is changed."""
    shutil.copytree(checkpoint, folder)
    document = json.loads((folder / CONFIG_FILE).read_text())
    change(document)
    (folder / CONFIG_FILE).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.pop("model"), r"damaged \('model'\)"),
        (lambda document: document.update(model=[1]), r"damaged \(model \[1\]"),
        (lambda document: document.update(clip={"model": 5, "dtype": "float32"}), r"damaged \(clip"),
        (lambda document: document["model"].update(tau_2=1), "model field 'tau_2': not known to this release"),
        (lambda document: document["model"].update(num_heads="2"), "model num_heads = '2': must be of type int"),
        (lambda document: document["model"].update(tau=0), "tau 0.0: must be greater than 0"),
        (lambda document: document.update(captioner=["pcmnet"]), "not known here|another captioner"),
    ],
)
@pytest.mark.parametrize("in_ensemble", [False, True])
def test_a_checkpoint_of_another_release_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str, in_ensemble: bool
) -> None:
    other = changed_config(checkpoint, tmp_path / "other", change)
    with pytest.raises(InputError, match=said) as caught:
        Captioner.load([checkpoint, other] if in_ensemble else other, device="cpu")
    assert str(other) in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_of_other_feature_sizes_is_refused(captioner: Captioner) -> None:
    other = copy.copy(captioner.clip)
    other.patch_dim = 7
    with pytest.raises(InputError, match="its features"):
        Captioner(captioner.model, vocabulary=captioner.vocabulary, concepts=captioner.concepts, clip=other)


@pytest.mark.parametrize(
    ("name", "recorded", "said"),
    [
        ("ViT-B-32/openai", None, True),
        ("ViT-B-32/openai", "quick_gelu", False),
        ("ViT-B-32-quickgelu/openai", None, False),  # it was quick_gelu before, too
        ("ViT-B-32/laion2b_s34b_b79k", None, False),  # and this was gelu
    ],
)
def test_a_checkpoint_that_does_not_say_its_activation_is_named_with_what_was_assumed(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, recorded: str | None, said: bool
) -> None:
    clip = {"model": name, "dtype": "float32"} | ({"activation": recorded} if recorded else {})
    old = changed_config(checkpoint, tmp_path / "old", lambda document: document.update(clip=clip))
    captioner = Captioner.load(old, device="cpu")
    (tmp_path / "clip").mkdir()
    with shrunk(name.partition("/")[0], tmp_path / "clip"), pytest.raises(InputError, match="its features"):
        captioner.clip  # noqa: B018  (of other sizes than the tiny one's)
    lines = [record.getMessage() for record in caplog.records if "does not say which activation" in record.getMessage()]
    assert len(lines) == said
    assert all("assumed is quick_gelu" in line and "To state it" in line and "\n" not in line for line in lines)


def test_a_clip_folder_that_changed_since_it_was_recorded_is_refused_and_another_folder_is_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    moved = shutil.copytree(clip, tmp_path / "moved")
    recorded = {"model": str(clip), "dtype": "float32", "revision": folder_revision(clip)}
    mine = changed_config(checkpoint, tmp_path / "run/best", lambda document: document.update(clip=recorded))
    (mine.parent / CONFIG_FILE).write_text(json.dumps({"clip_option": str(clip)}))
    for given in (None, clip, moved):
        assert Captioner.load(mine, clip=given and str(given), device="cpu").clip
    assert not [record for record in caplog.records if "its files are" in record.getMessage()]
    save_tiny_clip(clip, seed=5)
    with pytest.raises(
        InputError, match=r"its files are sha256:.* trained with sha256:.*; put the same files there, or"
    ):
        _ = Captioner.load(mine, device="cpu").clip
    other = save_tiny_clip(tmp_path / "other", seed=5)
    copies = {str(other): str(other), "s3://bucket/other": str(other)}  # what is said names what was given
    for given in (str(clip), os.path.relpath(clip), *copies):
        caplog.clear()
        loaded = Captioner.load(mine, clip=given, device="cpu", find_clip=lambda name, _: copies.get(name, name)).clip
        assert loaded.name == copies.get(given, given)
        (said,) = [record.getMessage() for record in caplog.records if "its files are" in record.getMessage()]
        assert said.startswith(f"--clip {given}: its files are sha256:")


def test_the_embedded_clip_of_another_release_is_refused_with_what_helps(checkpoint: Path, tmp_path: Path) -> None:
    recorded = {"model": "embedded", "dtype": "float32", "revision": "sha256:" + "0" * 64}
    mine = changed_config(checkpoint, tmp_path / "best", lambda document: document.update(clip=recorded))
    with pytest.raises(InputError, match="install the release that trained it, or take these with --clip embedded"):
        _ = Captioner.load(mine, device="cpu").clip


def test_a_checkpoint_names_its_method_and_one_without_a_name_is_a_pcm_net(
    captioner: Captioner, checkpoint: Path, tmp_path: Path
) -> None:
    assert json.loads((checkpoint / CONFIG_FILE).read_text())["captioner"] == "pcmnet"
    old = changed_config(checkpoint, tmp_path / "old", lambda document: document.pop("captioner"))
    picture = scene(0)[1]
    assert Captioner.load(old, clip=captioner.clip, device="cpu").caption([picture]) == captioner.caption([picture])


def test_a_method_that_is_not_known_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    other = changed_config(checkpoint, tmp_path / "other", lambda document: document.update(captioner="viecap"))
    with pytest.raises(InputError, match=r"config\.json: captioner 'viecap' is not known here; known are pcmnet"):
        Captioner.load(other, device="cpu")


def test_a_checkpoint_alone_cannot_have_a_folder_opened(checkpoint: Path, tiny_clip: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(checkpoint, tmp_path / "downloaded" / "best")
    with pytest.raises(InputError, match=r"best/config.json: names the CLIP .* give --clip"):
        _ = Captioner.load(alone, device="cpu").clip
    for record in ({"clip_option": None}, {"clip": {"model": str(tiny_clip)}}, {"clip_option": "/another"}, ["no"]):
        (alone.parent / CONFIG_FILE).write_text(json.dumps(record))
        with pytest.raises(InputError, match="names the CLIP"):
            _ = Captioner.load(alone, device="cpu").clip
    assert Captioner.load(alone, clip=str(tiny_clip), device="cpu").clip.name == str(tiny_clip)
    (alone.parent / CONFIG_FILE).write_text(json.dumps({"clip_option": str(tiny_clip)}))
    assert Captioner.load(alone, device="cpu").clip.name == str(tiny_clip)
