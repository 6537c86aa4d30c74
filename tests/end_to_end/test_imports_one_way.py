"""Imports go one way: jobs -> cluster -> pcm, upwards through the rooms of a package, and never in a circle.

An import counts wherever it stands: in a function, where it may only save time, and under TYPE_CHECKING too, because a
file that needs another's types cannot be understood, or moved, without it.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

#: What a package must not import.
FORBIDDEN = {
    "pcm": {"cluster", "jobs", "tests", "ray", "fsspec", "s3fs", "boto3"},
    "cluster": {"jobs", "tests"},
    "jobs": {"tests"},
}

#: The rooms of a package, lowest first: a folder, or a file in the package's root. Each imports only what stands below.
#: Two of pcm's stand lower than in the design's list: a CLIP and a generator can be called "embedded", so that world
#: lies below both; and a published vocabulary is a pickle, so the reader of pickles lies below the text.
ORDER = {
    "pcm": (
        "errors",
        "model_faults",
        "reasons",
        "credentials",
        "documents",
        "line_timer",
        "name_value",
        "torchvision_shim",
        "precision",
        "images",
        "records",
        "spec",
        "contact_sheet",
        "safe_pickle",
        "embedded",
        "text",
        "clip",
        "generation",
        "kernels",
        "captioners",
        "official",
        "__init__",  # the public names: for users, not for the package itself
    ),
    "cluster": (
        "__init__",
        "numbers",
        "releases",
        "ray_internals",
        "ray_data_internals",
        "ray_autoscaler_internals",
        "ray_state",
        "submit_size",
        "session",
        "device",
        "options",
        "charts",
        "gpu_share",
        "store",
        "only_job",
        "shard_work",
        "weights",
        "sources",
        "dataset",
        "generation",
        "ingest",
        "curation",
        "training",
        "sweep",
        "evaluation",
        "export",
        "report",
        "demonstration",
    ),
}

#: The files that may import what Ray does not promise to keep: Ray Train's parts import torch, Ray Data's must not; its
#: state is known at once.
RAY_INTERNALS = {
    "cluster/ray_internals.py",
    "cluster/ray_data_internals.py",
    "cluster/ray_autoscaler_internals.py",
    "cluster/ray_state.py",
    "cluster/submit_size.py",
}

FILES = [path.relative_to(ROOT) for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, *, package: str = "") -> set[str]:
    """Every module that the source may import, by its full name: of `from a import b`, both a and a.b.

    `package` is the one that relative imports start from.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def imported_packages(source: str) -> set[str]:
    """Top-level names of every import in the source; relative ones stay in their package."""
    return {name.partition(".")[0] for name in imported_names(source)} - {""}


def imported_files(module: str, source: str, *, is_package: bool, modules: set[str]) -> set[str]:
    """Which of `modules` the source imports: of `from a import b`, a.b where that is a module, else a."""
    names = imported_names(source, package=module if is_package else module.rpartition(".")[0])
    inner = {name.rpartition(".")[0] for name in names if name in modules and name.rpartition(".")[0] in names}
    return {name for name in names & modules if name not in inner} - {module}


@functools.cache
def import_graph() -> dict[str, set[str]]:
    modules = {module_name(path) for path in FILES}
    return {
        module_name(path): imported_files(
            module_name(path), (ROOT / path).read_text(), is_package=path.name == "__init__.py", modules=modules
        )
        for path in FILES
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One chain of imports, from a module back to itself, for each module that is on one; the shortest of its own."""
    found = []
    for start in sorted(graph):
        paths = [[start]]
        seen: set[str] = set()
        while paths:
            path = paths.pop(0)
            for module in sorted(graph[path[-1]] - seen):
                seen.add(module)
                paths.append([*path, module])
                if module == start:
                    found.append([*path, module])
                    paths.clear()
                    break
    return found


def room(module: str) -> str:
    """The second part of a module's name; "__init__" of the package itself."""
    return [*module.split("."), "__init__"][1]


def upward(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for module, imported in graph.items():
        package = module.partition(".")[0]
        order = ORDER.get(package, ())
        for other in sorted(imported):
            if other.partition(".")[0] != package or room(other) == room(module) or not order:
                continue
            if order.index(room(other)) > order.index(room(module)):
                yield f"{module} imports {other}, but {room(module)} stands below {room(other)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    package = path.parts[0]
    forbidden = imported_packages((ROOT / path).read_text()) & FORBIDDEN[package]
    assert not forbidden, f"{path} imports {', '.join(sorted(forbidden))}"


def ray_internals(source: str) -> set[str]:
    """What the source imports of Ray that is private by its name, or by the version in it."""
    names = {name for name in imported_names(source) if name.startswith("ray.")}
    return {name for name in names if any(part.startswith("_") or part == "v2" for part in name.split("."))}


def test_private_parts_of_ray_are_imported_in_their_files_alone() -> None:
    paths = [*FILES, *(path.relative_to(ROOT) for path in sorted((ROOT / "benchmarks").rglob("*.py")))]
    found = {str(path): names for path in paths if (names := ray_internals((ROOT / path).read_text()))}
    assert found.keys() == RAY_INTERNALS, found
    assert ray_internals("def f():\n    from ray.train.torch.config import _TorchBackend") == {
        "ray.train.torch.config._TorchBackend"
    }


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_a_place_in_the_order(package: str) -> None:
    rooms = {room(module_name(path)) for path in FILES if path.parts[0] == package}
    assert rooms == set(ORDER[package]), "give a new room its place in ORDER, and take away one that is gone"


def test_a_room_imports_only_what_stands_below_it() -> None:
    assert not list(upward(import_graph()))


def test_files_do_not_import_each_other_in_a_circle() -> None:
    assert not circles(import_graph())


@pytest.mark.parametrize(
    "source",
    [
        "import ray.data",
        "def f():\n    from ray import data",
        "import importlib\nimportlib.import_module('ray.data')",
        "if TYPE_CHECKING:\n    from ray.data import Dataset",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert "ray" in imported_packages(source)


def test_files_are_told_apart_from_what_they_define() -> None:
    modules = {"pcm", "pcm.text", "pcm.text.rules", "pcm.embedded"}
    source = "from pcm import embedded\ndef f():\n    from . import rules\n    from pcm.text.rules import REASONS"
    seen = imported_files("pcm.text", source, is_package=True, modules=modules)
    assert seen == {"pcm.embedded", "pcm.text.rules"}
    assert imported_files("pcm.text.rules", "import pcm", is_package=False, modules=modules) == {"pcm"}


def test_a_circle_and_an_import_upwards_are_found() -> None:
    graph = {"pcm.a": {"pcm.b"}, "pcm.b": {"pcm.c"}, "pcm.c": {"pcm.a"}, "pcm.d": {"pcm.a"}}
    assert circles(graph) == [
        ["pcm.a", "pcm.b", "pcm.c", "pcm.a"],
        ["pcm.b", "pcm.c", "pcm.a", "pcm.b"],
        ["pcm.c", "pcm.a", "pcm.b", "pcm.c"],
    ]
    assert list(upward({"pcm.text.rules": {"pcm.errors", "pcm.clip.names"}})) == [
        "pcm.text.rules imports pcm.clip.names, but text stands below clip"
    ]


def test_there_is_something_to_check() -> None:
    assert {path.parts[0] for path in FILES} == set(FORBIDDEN)
    assert "cluster.store.store" in import_graph()["cluster.dataset.plan"]
