"""Contact sheets: every picture in its place, whatever its size and the length of its text."""

from PIL import Image

from pcm.contact_sheet import Cell, contact_sheet
from pcm.embedded.making.graded_sheet import graded

RED, BLUE = (200, 0, 0), (0, 0, 200)


def test_pictures_are_laid_out_row_by_row_and_small_ones_enlarged() -> None:
    cells = [Cell(Image.new("RGB", (4, 4), colour), ("caption",)) for colour in (RED, RED, BLUE)]
    sheet = contact_sheet(cells, columns=2, side=40, text_lines=1)
    first_row, second_row = sheet.height // 4, sheet.height * 3 // 4 - 10
    assert sheet.getpixel((sheet.width // 4, first_row - 10)) == RED
    assert sheet.getpixel((sheet.width * 3 // 4, first_row - 10)) == RED
    assert sheet.getpixel((sheet.width // 4, second_row)) == BLUE
    assert sheet.getpixel((sheet.width * 3 // 4, second_row)) == (255, 255, 255)


def test_large_pictures_keep_their_proportions() -> None:
    sheet = contact_sheet([Cell(Image.new("RGB", (400, 100), RED), ())], columns=1, side=40, text_lines=0)
    column = [sheet.getpixel((sheet.width // 2, y)) for y in range(sheet.height)]
    assert column.count(RED) == 10


def test_long_text_is_wrapped_and_cut_to_its_lines() -> None:
    def ink(text_lines: int) -> int:
        sheet = contact_sheet(
            [Cell(Image.new("RGB", (8, 8), "white"), ("word " * 50,))], side=80, text_lines=text_lines
        )
        return sum(pixel != (255, 255, 255) for pixel in sheet.get_flattened_data())

    assert 0 < ink(1) < ink(3)


def test_pictures_are_graded_best_middle_and_worst() -> None:
    scores = [0.1, 0.9, 0.5, 0.4, 0.8, 0.2, 0.6]
    assert graded(scores, 1) == [1, 2, 0]
    assert graded(scores, 2) == [1, 4, 6, 2, 5, 0]
    assert graded(scores, 3) == [1, 4, 6, 2, 3, 5, 0]  # too few for nine: all of them, best first
