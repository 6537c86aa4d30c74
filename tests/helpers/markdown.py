"""What a Markdown page holds, as far as tests of the documentation ask: code blocks, inline code, links, anchors."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Stands alone on the line before a code block that a test runs.
RUN = "<!-- run -->"

_FENCE = re.compile(r"^```(\w*)$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#{1,6} +(.*?) *#*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block. `line`: where its fence is, from 1. `before`: the paragraph above it, or ""."""

    page: Path
    line: int
    language: str
    text: str
    before: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Page:
    """One Markdown file. `prose`: its lines outside code blocks."""

    path: Path
    blocks: tuple[Block, ...]
    prose: tuple[str, ...]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures, code aside."""
        return [target for line in self.prose for target in _LINK.findall(_CODE.sub("", line))]

    @property
    def inline_code(self) -> list[str]:
        return [code for line in self.prose for code in _CODE.findall(line)]

    @property
    def anchors(self) -> set[str]:
        """What `#anchor` may name: headings as code hosts write them."""
        return {_anchor(found[1]) for line in self.prose if (found := _HEADING.match(line))}


def read_page(path: Path) -> Page:
    """Raises ValueError for a code block that is not closed."""
    blocks: list[Block] = []
    prose: list[str] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if not (fence := _FENCE.match(line.strip())):
            prose.append(line)
            continue
        above = _last_paragraph(prose)
        is_run = above.endswith(RUN)
        text = "\n".join(_until_fence(lines, path, number))
        before = above.removesuffix(RUN).strip()
        blocks.append(Block(path, number, fence[1], text, before, is_run))
        prose.append("")
    return Page(path, tuple(blocks), tuple(prose))


def _until_fence(lines: Iterator[tuple[int, str]], path: Path, opened: int) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == "```":
            return
        yield line
    raise ValueError(f"{path}:{opened}: the code block is not closed")


def _last_paragraph(lines: list[str]) -> str:
    """The lines above that belong together; one blank line before the code block is not counted."""
    end = len(lines) - 1 if lines and not lines[-1].strip() else len(lines)
    start = end
    while start > 0 and lines[start - 1].strip():
        start -= 1
    return "\n".join(lines[start:end])


def _anchor(heading: str) -> str:
    """Lower case, punctuation deleted, a hyphen for each space."""
    text = _LINK.sub("", heading).replace("`", "").lower()
    kept = (char for char in text if char in " -_" or unicodedata.category(char)[0] in "LN")
    return "".join(kept).replace(" ", "-")
