"""SPICE without its models: what is said, and that nothing is downloaded or written into the installed package."""

from pathlib import Path

import pytest

from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.request import EvaluateRequest
from pcm.errors import InputError
from pcm.text import metrics
from pcm.text.spice import SPICE_HOME_VARIABLE, SPICE_MODELS, spice, spice_home


def home_with(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"no jar")
    return folder


def test_a_folder_without_the_models_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = home_with(tmp_path / "half", SPICE_MODELS[0])
    with pytest.raises(InputError, match=rf"--spice-home .*half: has no {SPICE_MODELS[1]}; unpack"):
        spice_home(half, installed=tmp_path)
    monkeypatch.setenv(SPICE_HOME_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(InputError, match=f"{SPICE_HOME_VARIABLE}=.*gone: has no"):
        spice_home(None, installed=tmp_path)


def test_the_models_are_found_where_they_were_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPICE_HOME_VARIABLE, raising=False)
    assert spice_home(None, installed=tmp_path) is None
    home = home_with(tmp_path / "home", *SPICE_MODELS)
    assert spice_home(home, installed=tmp_path) == home
    monkeypatch.setenv(SPICE_HOME_VARIABLE, str(home))
    assert spice_home(None, installed=tmp_path) == home
    home_with(tmp_path / "lib", *SPICE_MODELS)  # where people put them into pycocoevalcap's own folder
    monkeypatch.delenv(SPICE_HOME_VARIABLE)
    assert spice_home(None, installed=tmp_path) == tmp_path / "lib"


def test_an_evaluation_with_a_wrong_folder_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    request = EvaluateRequest(
        checkpoint=str(tmp_path / "none"), images="embedded:val", spice_home=str(tmp_path), device="cpu"
    )
    with pytest.raises(InputError, match=r"--spice-home .*: has no stanford-corenlp-3\.6\.0\.jar and no"):
        evaluate(request)


def test_a_scorer_that_fails_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    home, installed = home_with(tmp_path / "home", *SPICE_MODELS), metrics._package() / "spice"
    before = sorted(installed.iterdir())
    with pytest.raises(RuntimeError, match=r"SPICE's Java process ended with status [1-9]\d*: .+"):
        spice({"1": ["a dog"]}, {"1": ["a cat"]}, home=home, installed=installed, java=metrics.java())
    assert sorted(installed.iterdir()) == before
