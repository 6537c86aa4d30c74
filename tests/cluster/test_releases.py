"""Libraries of another release than is needed are told of in one line, before anything is written."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pcm
from cluster.curation.tasks import _seconds_of
from cluster.evaluation.captioning import _CaptionWorker
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.releases import NEEDED, _is_within, check_releases
from cluster.shard_work import _call_each
from cluster.store.store import open_store
from cluster.training.worker import set_up_worker
from pcm.errors import InputError
from tests.helpers.paths import ROOT
from tests.helpers.tiny_generation import null_spec, write_corpus


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets these releases be the installed ones; None: not installed."""

    def install(**releases: str | None) -> None:
        def found(*, name: str) -> list[SimpleNamespace]:
            release = releases[name] if name in releases else version(name)
            return [] if release is None else [SimpleNamespace(version=release)]

        monkeypatch.setattr("cluster.releases.distributions", found)

    check_releases.cache_clear()
    yield install
    check_releases.cache_clear()


def test_what_is_needed_is_what_pyproject_has_pip_install() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {re.split(r"[\[>]", each)[0]: re.sub(r"^[^>]*", "", each) for each in said}
    assert dict(NEEDED) == found
    assert all(re.fullmatch(r">=[\d.]+(,<[\d.]+)?", needed) for needed in NEEDED.values())


@pytest.mark.parametrize(
    ("release", "needed", "within"),
    [
        ("2.60.0", ">=2.60,<2.61", True),
        ("2.60", ">=2.60,<2.61", True),
        ("2.59.9", ">=2.60,<2.61", False),
        ("2.61.0", ">=2.60,<2.61", False),
        ("2.100.1", ">=2.60", True),
        ("2.13.0+cu128", ">=2.13,<2.14", True),
        ("2.13.0a0+0b1d2f3", ">=2.13,<2.14", True),
        ("27.0.0.dev12", ">=26", True),
        ("13", ">=12", True),
        ("0.2", ">=0.2.3", False),
    ],
)
def test_releases_are_compared_by_their_numbers(release: str, needed: str, within: bool) -> None:
    assert _is_within(release, needed) is within


def test_the_libraries_that_the_tests_run_with_are_fit_and_none_is_imported() -> None:
    code = (
        "import sys; from cluster.releases import NEEDED, check_releases; check_releases();"
        "print([name for name in (*NEEDED, 'PIL', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_all_that_is_wrong_is_named(installed: Callable[..., None]) -> None:
    installed(ray="2.55.1", peft=None)
    with pytest.raises(InputError) as caught:
        check_releases()
    assert str(caught.value) == (
        f"libraries on {os.uname().nodename}: pcmnet-ray {pcm.__version__} needs ray >=2.60,<2.61 (installed: 2.55.1), "
        "peft >=0.21 (not installed); build the image of this checkout anew (deploy/Dockerfile), or install it with "
        "make install"
    )


@pytest.mark.parametrize("left", ["peft-0.22.0.dist-info", "peft-0.1.0.dist-info"])
def test_what_pip_has_left_behind_of_another_release_does_no_harm(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder without a release, one of an older one."""
    (tmp_path / left).mkdir()
    if "0.1.0" in left:
        (tmp_path / left / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_releases.cache_clear()
    check_releases()


def test_a_job_with_another_release_ends_in_one_line_and_writes_nothing(
    installed: Callable[..., None], call_job: Callable[..., Any], tmp_path: Path
) -> None:
    installed(diffusers="0.36.0")
    corpus, out = write_corpus(tmp_path), tmp_path / "data"
    run = call_job("generate", "--corpus", corpus, "--t2i", "null", "--clip", "null", "--out", out)
    assert run.returncode == 2 and not out.exists()
    assert run.stderr.startswith("error: libraries on ") and run.stderr.count("\n") == 1
    assert "needs diffusers >=0.42 (installed: 0.36.0)" in run.stderr


unused: Any = None  # what is never reached


@pytest.mark.parametrize(
    "begin",
    [
        lambda store: DrawShard(store, null_spec()),
        lambda store: FeaturiseShard(null_spec().clip),
        lambda store: _CaptionWorker(source=unused, threads=1),
        lambda store: set_up_worker(unused),
        lambda store: _call_each([unused], [], [1]),
        lambda store: _seconds_of(unused),
    ],
    ids=["draw", "featurise", "caption", "train", "shards", "pieces"],
)
def test_a_worker_with_another_release_does_nothing(
    begin: Callable[..., object], installed: Callable[..., None], tmp_path: Path
) -> None:
    installed(torch="2.12.1")
    with pytest.raises(InputError, match=r"needs torch >=2.13,<2.14 \(installed: 2.12.1\)"):
        begin(open_store(tmp_path))
