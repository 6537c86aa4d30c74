"""A grid of pictures with text beneath: the quickest way to judge a dataset or a captioner by eye."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_TEXT_COLOUR = (30, 30, 30)
_MARGIN = 8
_FONT_SIZE = 12
_LINE_HEIGHT = 15


@dataclass(frozen=True)
class Cell:
    """One picture and the lines under it; long lines are wrapped."""

    image: Image.Image
    lines: tuple[str, ...]


def contact_sheet(cells: Sequence[Cell], *, columns: int = 6, side: int = 160, text_lines: int = 4) -> Image.Image:
    """Lay cells out row by row; pictures are fitted into side x side pixels, small ones enlarged without smoothing."""
    font = ImageFont.load_default(_FONT_SIZE)
    rows = -(-len(cells) // columns)
    cell_height = side + text_lines * _LINE_HEIGHT + _MARGIN
    size = (columns * (side + _MARGIN) + _MARGIN, rows * (cell_height + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * (side + _MARGIN), _MARGIN + row * (cell_height + _MARGIN)
        sheet.paste(_fitted(cell.image, side), (x, y))
        for line_number, line in enumerate(_wrapped(cell.lines, font, side)[:text_lines]):
            draw.text((x, y + side + 2 + line_number * _LINE_HEIGHT), line, fill=_TEXT_COLOUR, font=font)
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smooth)


def _wrapped(lines: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, side: int) -> list[str]:
    characters = max(8, int(side / (font.getlength("abcdefghij") / 10)))
    return [part for line in lines for part in textwrap.wrap(line, characters)]
