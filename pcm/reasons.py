"""Why a sample has no picture: every reason of quarantine, what it means, and whether another try can help.

This is the one home of the reasons. What checks captions, draws, imports, retries, verifies and reports reads them from
here, and `python -m pcm.reasons` prints them as the table of docs/corpora.md. A new reason is a name and a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: What failed: the record of the corpus, the process or model that draws, the picture it drew, CLIP, or a file that an
#: import needs beside the captions.
Stage = Literal["caption", "generator", "picture", "clip", "import"]

#: What `jobs.generate --retry-quarantined` does with it: nothing, or the same seed once more (the fault was the
#: machine's or the model's), or the next seeds (the picture was at fault).
Retry = Literal["none", "same seed", "next seeds"]

# Captions, in the order in which pcm.text.rules tests them.
BAD_RECORD = "bad_record"
MISSING_CAPTION = "missing_caption"
REJECTED = "rejected"
INVALID_UTF8 = "invalid_utf8"
CONTROL_CHARACTERS = "control_characters"
EMPTY = "empty"
TOO_LONG = "too_long"

# Generators.
GENERATOR_ERROR = "generator_error"
GENERATOR_CRASHED = "generator_crashed"
GENERATOR_HUNG = "generator_hung"
OUT_OF_MEMORY = "out_of_memory"

# Pictures that a generator drew.
BLACK_IMAGE = "black_image"
CONSTANT_IMAGE = "constant_image"
NAN_IMAGE = "nan_image"
NSFW_FLAGGED = "nsfw_flagged"

CLIP_ERROR = "clip_error"

# Files of photos and published data.
MISSING_IMAGE = "missing_image"
BAD_IMAGE = "bad_image"
MISSING_CLIP_SCORE = "missing_clip_score"
MISSING_FEATURES = "missing_features"
BAD_FEATURES = "bad_features"
FEATURES_OF_ANOTHER_SHAPE = "features_of_another_shape"
FEATURES_BEYOND_FLOAT16 = "features_beyond_float16"

# A mark: such a sample is generated and stored all the same.
PROMPT_TRUNCATED = "prompt_truncated"


@dataclass(frozen=True)
class Reason:
    """One row: the name as it stands in the `reason` column, and what it means to a user."""

    name: str
    stage: Stage
    retry: Retry
    text: str


@dataclass(frozen=True)
class Mark:
    """A `reason` of samples that are usable, and stored."""

    name: str
    text: str


_ROWS = (
    Reason(
        BAD_RECORD, "caption", "none",
        "the record has the wrong shape: malformed JSON, a caption that is no string, too few fields",
    ),
    Reason(MISSING_CAPTION, "caption", "none", "the record has no caption (the field is absent or null)"),
    Reason(
        REJECTED, "caption", "none",
        "the file itself says that it is no caption (VizWiz: is_rejected, is_precanned)",
    ),
    Reason(INVALID_UTF8, "caption", "none", "the caption is not valid UTF-8 (or holds a lone surrogate)"),
    Reason(
        CONTROL_CHARACTERS, "caption", "none",
        "a control character (Unicode category Cc) that is not white space; NUL is one",
    ),
    Reason(EMPTY, "caption", "none", "nothing visible is left: empty, white space, or zero-width characters alone"),
    Reason(TOO_LONG, "caption", "none", "more than 2,000 characters after normalisation"),
    Reason(
        GENERATOR_ERROR, "generator", "same seed",
        "the model raised on this caption alone; the error is in the shard's stats",
    ),
    Reason(GENERATOR_CRASHED, "generator", "same seed", "process after process died with this caption in the batch"),
    Reason(
        GENERATOR_HUNG, "generator", "same seed",
        "process after process took longer than --batch-timeout with this caption in the batch",
    ),
    Reason(
        OUT_OF_MEMORY, "generator", "same seed",
        "the picture did not fit into memory, not even alone; before that the batch was halved again and again",
    ),
    Reason(BLACK_IMAGE, "picture", "next seeds", "the picture is black with each of --max-attempts seeds"),
    Reason(CONSTANT_IMAGE, "picture", "next seeds", "the picture has one colour with each of --max-attempts seeds"),
    Reason(NAN_IMAGE, "picture", "next seeds", "pixels are not numbers with each of --max-attempts seeds"),
    Reason(
        NSFW_FLAGGED, "picture", "next seeds",
        "the model's safety checker blanked the picture with each of --max-attempts seeds",
    ),
    Reason(
        CLIP_ERROR, "clip", "same seed",
        "CLIP raised on the picture, or gave a feature that float16 does not hold; the error is in the shard's stats",
    ),
    Reason(MISSING_IMAGE, "import", "none", "the caption's picture is not there, or the caption names none"),
    Reason(BAD_IMAGE, "import", "none", "the picture cannot be decoded, or is no JPEG, PNG or WebP"),
    Reason(
        MISSING_CLIP_SCORE, "import", "none",
        "the annotation has no CLIP score, and none is computed where features are given",
    ),
    Reason(MISSING_FEATURES, "import", "none", "the picture's features are not there"),
    Reason(BAD_FEATURES, "import", "none", "the file of features cannot be read"),
    Reason(FEATURES_OF_ANOTHER_SHAPE, "import", "none", "the features have other sizes than those of the dataset"),
    Reason(FEATURES_BEYOND_FLOAT16, "import", "none", "a feature is infinite, or not a number, as float16"),
)  # fmt: skip

_MARKS = (
    Mark(
        PROMPT_TRUNCATED,
        "stored: the prompt is longer than the drawing model reads, and the picture was drawn from what fits into it",
    ),
)

#: All reasons of quarantine by name, in the order of the docs.
REASONS: dict[str, Reason] = {row.name: row for row in _ROWS}
#: All marks of stored samples by name.
MARKS: dict[str, Mark] = {mark.name: mark for mark in _MARKS}

#: Values of the `reason` column with which a sample is generated and stored. Any other means quarantine.
USABLE = ("", *MARKS)

#: Reasons for which a sample can be tried again.
RETRYABLE = tuple(row.name for row in _ROWS if row.retry != "none")


def of_stage(stage: Stage) -> tuple[str, ...]:
    """Names of the reasons of one stage, in the table's order."""
    return tuple(row.name for row in _ROWS if row.stage == stage)


def text_of(name: str) -> str:
    """What a reason or mark means, in one line; "" for one that this version does not know."""
    row = REASONS.get(name) or MARKS.get(name)
    return row.text if row else ""


def markdown_table() -> str:
    """The reasons and marks as a Markdown table, without a line end after its last row."""
    rows = [(f"`{row.name}`", row.text, _RETRY_TEXT[row.retry]) for row in _ROWS]
    rows += [(f"`{mark.name}`", mark.text, "") for mark in _MARKS]
    return "\n".join(map(_table_line, [("reason", "when", "tried again with"), ("---", "---", "---"), *rows]))


_RETRY_TEXT: dict[Retry, str] = {"none": "", "same seed": "the same seed", "next seeds": "the next seeds"}


def _table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown_table())
