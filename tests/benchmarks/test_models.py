"""The page of the models: rows that it has stay, and the rest of the page is left alone."""

from pathlib import Path

import pytest

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip

from benchmarks.models import CLIP_HEADER, CLIP_MARKS, PAGE, rows_of, with_rows

EMPTY = f"# Models\n\nProse.\n\n{CLIP_MARKS[0]}\n{CLIP_MARKS[1]}\n\n## Others\n"


def test_a_row_is_added_by_name_and_the_others_stay() -> None:
    page = with_rows(EMPTY, {"b": "| b | tag |"})
    page = with_rows(page, {**rows_of(page), "A": "| A | - |"})
    assert rows_of(page) == {"A": "| A | - |", "b": "| b | tag |"}
    assert page.index("| A |") < page.index("| b |")
    assert page.startswith("# Models\n\nProse.\n") and page.endswith("\n\n## Others\n")
    assert all(page.count(line) == 1 for line in CLIP_HEADER)


def test_a_page_without_the_marks_is_left_alone() -> None:
    assert rows_of("# Models\n") == {}
    with pytest.raises(ValueError, match="substring not found"):
        with_rows("# Models\n", {})


def test_the_page_has_every_architecture_and_each_is_as_open_clip_makes_it() -> None:
    rows = rows_of(Path(PAGE).read_text(encoding="utf-8"))
    assert set(rows) == set(open_clip.list_models())
    assert [name for name, row in rows.items() if not row.endswith("| yes | yes |")] == []
