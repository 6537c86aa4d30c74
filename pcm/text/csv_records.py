"""The records of a delimited text file, when some of its quotes are only characters.

A CSV writer puts quotes round a field and doubles those inside. People's files also hold captions that begin with a
quote and were never quoted. Taken as an opening quote, such a character swallows the lines after it. So the evidence
decides, one record at a time:

1. A field is quoted only if it begins with a quote and its closing quote stands before a delimiter or a line end.
   Otherwise the quote is a character of the field, and the line is a record of its own.
2. A quoted field may run over several lines, at most MAX_LINES. It does not if every one of those lines has the right
   number of fields by itself and nothing else in the file shows that fields are quoted.
3. In a file of tabs quotes are characters, unless the file proves the opposite: a quoted field near its beginning holds
   a tab or a doubled quote, and no field there begins with a quote that is not closed.

`quoting` "quoted" or "none" states it instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

QUOTINGS = ("auto", "quoted", "none")

#: A quoted field that runs over more lines than this is a quote that nobody closed.
MAX_LINES = 32
#: So many lines at the beginning are looked at for proof that fields are quoted.
SAMPLE_LINES = 1000


@dataclass
class QuoteCounts:
    """What was decided, for one line in the log."""

    records_over_lines: int = 0
    literal_quotes: int = 0  # records with a field that begins with a quote which is a character


@dataclass
class CsvRecords:
    """Iterates over the records of `lines` (with or without their line ends) as lists of fields.

    columns: how many fields a record should have. Records with more or fewer come out all the same.
    """

    lines: Iterator[str]
    delimiter: str
    columns: int
    quoting: str = "auto"
    counts: QuoteCounts = field(default_factory=QuoteCounts)

    def __iter__(self) -> Iterator[list[str]]:
        ahead = list(islice(self.lines, SAMPLE_LINES))  # read, but not taken yet
        self._proven = self.quoting == "quoted" or (self.quoting == "auto" and self._is_quoted(ahead))
        self._literal = self.quoting == "none" or (self.delimiter == "\t" and not self._proven)
        ahead.reverse()
        while True:
            if not ahead:
                ahead = list(islice(self.lines, SAMPLE_LINES))
                ahead.reverse()
                if not ahead:
                    return
            line = ahead.pop().rstrip("\r\n")
            if line:
                yield self._record(line, ahead)

    def _record(self, line: str, ahead: list[str]) -> list[str]:
        if '"' not in line:
            return line.split(self.delimiter)
        if not self._literal:
            fields = split_quoted(line, self.delimiter)
            if isinstance(fields, list):
                return fields
            if fields is OPEN and (found := self._over_lines(line, ahead)) is not None:
                self.counts.records_over_lines += 1
                return found
        plain = line.split(self.delimiter)
        self.counts.literal_quotes += any(text.startswith('"') for text in plain)
        return plain

    def _over_lines(self, line: str, ahead: list[str]) -> list[str] | None:
        """The record that `line` begins, if its quoted field ends in a line to come; those lines are then taken."""
        text, alike = line, self._fits(line)
        for taken in range(1, MAX_LINES):
            if len(ahead) < taken:
                ahead[:0] = reversed(list(islice(self.lines, SAMPLE_LINES)))
                if len(ahead) < taken:
                    return None
            following = ahead[-taken].rstrip("\r\n")
            text = f"{text}\n{following}"
            alike = alike and self._fits(following)
            fields = split_quoted(text, self.delimiter)
            if isinstance(fields, list):
                if alike and not self._proven:
                    return None
                del ahead[-taken:]
                return fields
            if fields is not OPEN:
                return None
        return None

    def _fits(self, line: str) -> bool:
        """Whether a line is a record by itself. One column proves nothing: there every line is."""
        return self.columns > 1 and line.count(self.delimiter) + 1 == self.columns

    def _is_quoted(self, lines: list[str]) -> bool:
        """Whether these lines prove that fields are quoted: see rule 3."""
        proven = False
        for line in lines:
            if '"' not in line:
                continue
            text = line.rstrip("\r\n")
            fields = split_quoted(text, self.delimiter)
            if isinstance(fields, list):
                proven = proven or any(
                    self.delimiter in value or '"' in value for value in _quoted_fields(text, fields)
                )
            elif self.delimiter == "\t":
                return False
        return proven


class _Outcome:
    """Why a line is no record of quoted and plain fields."""


OPEN = _Outcome()  # a quoted field is not closed
MALFORMED = _Outcome()  # a field begins with a quote, and the next lone quote is not at its end


def split_quoted(text: str, delimiter: str) -> list[str] | _Outcome:
    """The fields of one record, in which a field that begins with a quote is a quoted one; else OPEN or MALFORMED."""
    fields: list[str] = []
    start, end = 0, len(text)
    while True:
        if text[start : start + 1] != '"':
            stop = text.find(delimiter, start)
            if stop < 0:
                fields.append(text[start:])
                return fields
            fields.append(text[start:stop])
            start = stop + 1
            continue
        close = text.find('"', start + 1)
        while close >= 0 and text[close + 1 : close + 2] == '"':
            close = text.find('"', close + 2)
        if close < 0:
            return OPEN
        fields.append(text[start + 1 : close].replace('""', '"'))
        if close + 1 == end:
            return fields
        if text[close + 1] != delimiter:
            return MALFORMED
        start = close + 2


def _quoted_fields(text: str, fields: list[str]) -> list[str]:
    """Those of the fields that stand quoted in `text`: a field that is as it stands is none."""
    return [value for value in fields if value and f'"{value.replace(chr(34), chr(34) * 2)}"' in text]
