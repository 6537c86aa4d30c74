"""Each family's tiny pipeline does what its row of the models page says; the page's own command makes the row."""

from pathlib import Path

import pytest

from benchmarks.models import PAGE, T2I_MARKS, rows_of
from benchmarks.picture_models import picture_rows
from tests.helpers.tiny_pipelines import FAMILIES, save_pipeline

#: One that draws in batches, one that draws one at a time, one that is refused; the others take minutes together.
QUICK = ("sd15", "cogview4", "kandinsky_decoder")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_does_what_the_page_says(family: str, tmp_path: Path) -> None:
    ((name, row),) = picture_rows([save_pipeline(family, tmp_path / family)])
    assert row == rows_of(Path(PAGE).read_text(encoding="utf-8"), T2I_MARKS)[name]


def test_the_page_has_every_family_and_no_picture_depends_on_its_neighbours() -> None:
    rows = rows_of(Path(PAGE).read_text(encoding="utf-8"), T2I_MARKS)
    assert set(FAMILIES) <= set(rows)
    drawn = {
        name: row.split("|") for name, row in rows.items() if "refused: text" not in row and "never run" not in row
    }
    assert [name for name, cells in drawn.items() if cells[4].strip() != "yes"] == []
