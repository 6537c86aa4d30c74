"""Imports go one way, jobs -> cluster -> pcm, and the method knows neither Ray nor storage."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

#: What a package must not import.
FORBIDDEN = {
    "pcm": {"cluster", "jobs", "tests", "ray", "fsspec", "s3fs", "boto3"},
    "cluster": {"jobs", "tests"},
    "jobs": {"tests"},
}
FILES = [path.relative_to(ROOT) for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str) -> set[str]:
    """Top-level names of every import in the source, inside functions too; relative ones stay in their package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            found |= {str(arg.value).partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    package = path.parts[0]
    forbidden = imported_packages((ROOT / path).read_text()) & FORBIDDEN[package]
    assert not forbidden, f"{path} imports {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize(
    "source",
    ["import ray.data", "def f():\n    from ray import data", "import importlib\nimportlib.import_module('ray.data')"],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert "ray" in imported_packages(source)


def test_there_is_something_to_check() -> None:
    assert {path.parts[0] for path in FILES} == set(FORBIDDEN)
