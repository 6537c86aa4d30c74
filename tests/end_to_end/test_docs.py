"""The documentation says what is so: links, files, options and tables are checked, and its commands are run."""

import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from cluster.options import options_of
from jobs.__main__ import job_names, load_job
from pcm.reasons import markdown_table
from tests.helpers.markdown import Block, Page, read_page
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
#: Every page of the repository, wherever it lies.
PATHS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "benchmarks", "pcm") for path in (ROOT / folder).rglob("*.md"))]
)
#: The pages that tell a user what to type.
MANUAL = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
README_LINES = 130

#: Inline code that names a file or folder of ours. NEW stands for what a reader will write.
OUR_PATH = re.compile(r"(?:pcm|cluster|jobs|tests|benchmarks|deploy|docs)/[\w./-]*")
PYTHON_NAME = re.compile(r"((?:pcm|cluster)(?:\.\w+)+)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
#: What stands for any job.
PLACEHOLDERS = {"jobs.NAME", "jobs.X"}
MODULE = re.compile(r"python -m ((?:jobs|benchmarks|pcm|tests)[\w.]*)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pages(paths: list[Path]) -> list[Page]:
    return [read_page(path) for path in paths]


def commands(page: Page) -> list[str]:
    """Every command of its code blocks on a line of its own, and its inline code."""
    lines = [line for block in page.blocks for line in block.text.replace("\\\n", " ").splitlines()]
    return [*lines, *page.inline_code]


def broken_links(page: Page) -> list[str]:
    """Links to files that are not there, and to anchors that their page does not have; the web is not asked."""
    broken = []
    for target in page.links:
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.path.parent / file).resolve() if file else page.path
        if not found.exists() or (anchor and anchor not in read_page(found).anchors):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(read_page(path)) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("## Two words, and `code`\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#two-words-and-code) [b](other.md#three) [c](gone.md) `[d](code.md)`\n")
    assert broken_links(read_page(page)) == ["other.md#three", "gone.md"]


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = [code for code in read_page(path).inline_code if OUR_PATH.fullmatch(code) and "NEW" not in code]
    assert [code for code in named if not (ROOT / code).exists()] == []
    modules = {code for code in read_page(path).inline_code if re.fullmatch(r"\w+\.py", code)} - {"utils.py"}
    parts = ("cluster", "pcm", "jobs", "tests", "benchmarks")
    assert modules <= {module.name for part in parts for module in (ROOT / part).rglob("*.py")}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def run_order() -> list[Path]:
    """The pages in the order in which the index says that they are run."""
    text = INDEX.read_text().partition("<!-- run order -->")[2].strip().partition("\n\n")[0]
    return [DOCS / link for link in re.findall(r"\]\(([\w-]+\.md)\)", text)]


def test_index_names_every_page() -> None:
    there = {path for path in DOCS.rglob("*.md") if path != INDEX}
    assert set(run_order()) == there
    assert {(DOCS / link).resolve() for link in read_page(INDEX).links} >= there


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_modules_that_are_named_exist(path: Path) -> None:
    modules = {module for command in commands(read_page(path)) for module in MODULE.findall(command)}
    assert [module for module in sorted(modules - PLACEHOLDERS) if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("path", MANUAL, ids=name)
def test_python_names_exist(path: Path) -> None:
    codes = read_page(path).inline_code
    names = {found[1] for code in codes if (found := PYTHON_NAME.match(code))}
    assert [dotted for dotted in sorted(names) if not resolves(dotted)] == []


def resolves(dotted: str) -> bool:
    """Whether a module, or something in one, has this name."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def options(job: str) -> set[str]:
    """What --help names."""
    return set(OPTION.findall(load_job(job).help()))


@pytest.mark.parametrize("path", MANUAL, ids=name)
def test_options_of_a_job_are_its_own(path: Path) -> None:
    unknown = []
    for command in commands(read_page(path)):
        program, _, arguments = command.partition("jobs.")
        job = arguments.partition(" ")[0]
        if "python -m" in program and job in job_names():
            unknown += [f"jobs.{job} {option}" for option in set(OPTION.findall(arguments)) - options(job)]
    assert unknown == []


def test_options_in_the_text_are_of_some_job() -> None:
    known = set().union(*map(options, job_names()))
    unknown = [
        f"{name(page.path)}: {code}"
        for page in pages(MANUAL)
        for code in page.inline_code
        if code.startswith("--") and not set(OPTION.findall(code)) <= known
    ]
    assert unknown == []


#: Without a request in cluster/: it makes what is stored in the repository.
NO_CALL = {"pretrain_embedded"}


def test_every_job_stands_among_the_calls_with_its_request() -> None:
    rows = re.findall(r"^\| `jobs\.(\w+)` \| `([\w.]+)` \|", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert {job for job, _ in rows} == set(job_names()) - NO_CALL
    assert [job for job, request in rows if pkgutil.resolve_name(request) is not load_job(job).request] == []


def test_every_call_takes_its_request_and_returns_a_summary() -> None:
    row = r"^\| `jobs\.\w+` \| `([\w.]+)` \| `([\w.]+)` \|$"
    rows = re.findall(row, (DOCS / "python.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(job_names()) - NO_CALL)
    for request, function in rows:
        takes, *_, (name, returned) = typing.get_type_hints(pkgutil.resolve_name(function)).items()
        assert issubclass(pkgutil.resolve_name(request), takes[1]), function
        assert name == "return" and dict in (returned, typing.get_origin(returned)), function


def test_every_field_with_another_name_than_its_option_is_named() -> None:
    others = {
        (field, f"--{described.flag}")
        for job in set(job_names()) - NO_CALL
        for field, described in options_of(load_job(job).request).items()
        if described.flag is not None
    }
    text = (DOCS / "python.md").read_text().partition("fields have another name than their option: ")[2]
    sentence = text.partition(". A value")[0]
    assert set(re.findall(r"`(\w+)`|`(--[\w-]+)`", sentence)) == {
        found for field, shown in others for found in ((field, ""), ("", shown))
    }
    assert f"{['Five', 'Six', 'Seven'][len(others) - 5]} fields have another name" in (DOCS / "python.md").read_text()


def test_reasons_are_those_of_the_code() -> None:
    table = (DOCS / "corpora.md").read_text().partition("<!-- reasons -->\n")[2].partition("\n<!-- /reasons -->")[0]
    assert table == markdown_table(), "fill the table of docs/corpora.md with what `python -m pcm.reasons` prints"


def test_layout_names_every_room() -> None:
    """architecture.md's tree has a line for each folder of pcm/ and cluster/, and for no other."""
    block = next(block for block in read_page(DOCS / "architecture.md").blocks if block.text.startswith("pcm/"))
    package, named = "", set()
    for line in block.text.splitlines():
        folder = re.match(r"( *)([\w.]+)/ ", line)
        if folder:
            package = package if folder[1] else folder[2]
            named |= {f"{package}/{folder[2]}"} if folder[1] else set()
    there = {name(init.parent) for package in ("pcm", "cluster") for init in (ROOT / package).glob("*/__init__.py")}
    assert named == there


def test_every_command_is_run_or_says_what_it_needs() -> None:
    silent = [
        str(block)
        for page in pages(MANUAL)
        for block in page.blocks
        if block.language in ("bash", "python") and not (block.is_run or re.search(r"^Needs |\. Needs ", needs(block)))
    ]
    assert silent == []


def needs(block: Block) -> str:
    return " ".join(block.before.split())


def test_a_marked_block_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n<!-- run -->\n```bash\ntrue\n```\n\nNeeds a GPU:\n\n```bash\nfalse\n```\n")
    first, second = read_page(page).blocks
    assert (first.is_run, first.text, first.line) == (True, "true", 4)
    assert (second.is_run, second.before) == (False, "Needs a GPU:")


@pytest.mark.slow
def test_commands_of_the_pages_run(tmp_path: Path) -> None:
    """In a copy of the checkout and a home of its own, page after page, as a reader types them."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    unwanted = (".git", ".venv", "demo", "out", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*unwanted))
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = [
        block for page in pages([ROOT / "README.md", INDEX, *run_order()]) for block in page.blocks if block.is_run
    ]
    assert blocks
    (checkout / "out").mkdir()
    for block in blocks:
        run_block(block, checkout, environment)


def run_block(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Fails with the end of what the block printed."""
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run(
        [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
    )
    printed = f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{block}: exit status {done.returncode}\n{block.text}\n{printed}"
