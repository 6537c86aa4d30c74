"""Lists of rows that people, or programs, have marked: JSONL of {"sample_id", "mark", "tags"}."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.store.store import read_uri
from pcm.documents import read_document
from pcm.errors import InputError

log = logging.getLogger(__name__)

KEEP, DROP = "keep", "drop"


@dataclass(frozen=True)
class Marks:
    """ids: the rows that a list names. unreadable: lines that are none."""

    ids: frozenset[str]
    unreadable: int


def read_marks(uri: str, *, but_for: str, tags: Sequence[str] = ()) -> Marks:
    """The rows of a list, but for those whose mark is `but_for` ("keep" or "drop"): so one list of both marks serves
    as --keep-list and as --drop-list. The last line of a row counts. With `tags`, only lines with one of these.

    A line that is no such object is counted and logged. Raises InputError where the list is not there, or no line of it
    can be read.
    """
    found: dict[str, bool] = {}
    unreadable = 0
    lines = [line for line in read_uri(uri).splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            entry = read_document(line)
            sample, mark, tagged = entry["sample_id"], entry.get("mark"), entry.get("tags") or ()
            if not isinstance(sample, str) or mark not in (None, KEEP, DROP) or not isinstance(tagged, list | tuple):
                raise TypeError
        except (ValueError, TypeError, LookupError, AttributeError):
            unreadable += 1
            if unreadable <= 3:
                log.warning(
                    '%s, line %d: left out; a line is {"sample_id": "000000012-00", "mark": "%s" or "%s", "tags": []}, '
                    "of which mark and tags may be missing", uri, number, KEEP, DROP,
                )  # fmt: skip
            continue
        if not tags or set(tags) & {tag for tag in tagged if isinstance(tag, str)}:
            found[sample] = mark != but_for
    if lines and unreadable == len(lines):
        raise InputError(
            f'{uri}: none of its {unreadable} lines is a mark; give JSONL of {{"sample_id", "mark", "tags"}}'
        )
    if tags and lines and not found:
        log.warning("%s: none of its lines has the tag %s", uri, " or ".join(tags))
    return Marks(frozenset(sample for sample, counts in found.items() if counts), unreadable)


def check_one_dataset(marks: Marks, own_ids: np.ndarray, *, option: str) -> int:
    """How many of the marked rows are not there. own_ids: of all rows of the data, at least one.

    Raises InputError where a marked id is in several datasets, and where none is there.
    """
    counted = Counter(sample for sample in own_ids if sample in marks.ids)
    twice = sorted(sample for sample, times in counted.items() if times > 1)
    if twice:
        raise InputError(
            f"{option}: {len(twice)} of its sample ids (such as {twice[0]}) are in more than one --data; curate that "
            "dataset by the list first, then merge"
        )
    if marks.ids and not counted:
        raise InputError(
            f"{option}: none of the {len(marks.ids)} rows that it names (such as {min(marks.ids)}) is in the data; a "
            f"sample id looks like {own_ids[0]}"
        )
    return len(marks.ids) - len(counted)
