"""The one table of reasons: complete, unique, in the docs, and read by everything else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pcm import reasons
from pcm.reasons import MARKS, REASONS, RETRYABLE, USABLE, Mark, Reason, markdown_table, of_stage, text_of
from pcm.text.rules import MAX_CHARACTERS
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs/corpora.md"
CONSTANTS = {name: value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}


def test_every_name_has_one_row() -> None:
    assert sorted(CONSTANTS.values()) == sorted([*REASONS, *MARKS])
    assert all(name == value.upper() for name, value in CONSTANTS.items())


@pytest.mark.parametrize("row", [*REASONS.values(), *MARKS.values()], ids=lambda row: row.name)
def test_a_row_is_one_line_that_a_table_can_hold(row: Reason | Mark) -> None:
    assert row.text and not set(row.text) & set("|\n") and not row.text.endswith(".")
    assert text_of(row.name) == row.text


def test_a_reason_of_another_version_has_no_text() -> None:
    assert text_of("of_a_later_version") == ""


def test_a_reason_means_quarantine_and_a_mark_does_not() -> None:
    assert set(USABLE) == {"", "prompt_truncated"} and not set(USABLE) & set(REASONS)


def test_captions_and_missing_files_are_never_tried_again() -> None:
    assert set(RETRYABLE) == {*of_stage("generator"), *of_stage("picture"), *of_stage("clip")}
    assert {REASONS[name].retry for name in of_stage("picture")} == {"next seeds"}
    assert {REASONS[name].retry for name in (*of_stage("generator"), *of_stage("clip"))} == {"same seed"}


def test_the_text_of_too_long_has_the_rules_own_number() -> None:
    assert f"more than {MAX_CHARACTERS:,} characters" in text_of("too_long")


def strings(source: str) -> set[str]:
    """Every string in the source."""
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


@pytest.mark.parametrize("package", ["pcm", "cluster", "jobs"])
def test_no_reason_is_written_anywhere_else(package: str) -> None:
    again = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in Path(ROOT, package).rglob("*.py")
        if path != ROOT / "pcm/reasons.py"
        for name in strings(path.read_text()) & {*REASONS, *MARKS}
    }
    assert not again


def test_it_prints_the_table_of_the_docs() -> None:
    command = [sys.executable, "-m", "pcm.reasons"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == markdown_table() + "\n"
    assert len(printed.splitlines()) == 2 + len(REASONS) + len(MARKS)
    assert "| `black_image` | the picture is black with each of --max-attempts seeds | the next seeds |" in printed


@pytest.mark.skipif(not DOCS.exists(), reason="the page is written elsewhere")
def test_the_docs_show_the_table() -> None:
    shown = DOCS.read_text().partition("<!-- reasons -->")[2].partition("<!-- /reasons -->")[0]
    assert shown.strip() == markdown_table(), "paste what `python -m pcm.reasons` prints between the two markers"
