"""What a user asks of curation: datasets, rules, and where the rows that stay go."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.options import Request, check_at_least, flag, given, option, refuse_without
from pcm.errors import InputError
from pcm.reasons import MARKS

#: A word of a caption, as the rules count words.
ONE_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Subset:
    """So many rows, or a share of them."""

    count: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> "Subset":
        """Of "5000" or "0.2". Raises InputError."""
        try:
            if text.isdecimal() and int(text) >= 1:
                return Subset(count=int(text))
            if 0 < float(text) < 1:
                return Subset(share=float(text))
        except ValueError:
            pass
        raise InputError("must be a number of rows, such as 5000, or a share above 0 and below 1, such as 0.2")


@dataclass(frozen=True, kw_only=True)
class RuleOptions(Request):
    """Rules, applied in this order; a row goes by the first that it breaks."""

    keep_list: str | None = option(
        None, metavar="P", help="JSONL of sample_id, mark, tags: only these rows stay, except those marked drop"
    )
    drop_list: str | None = option(
        None, metavar="P", help="JSONL as for --keep-list: these rows go, except those marked keep"
    )
    tag: tuple[str, ...] = option((), metavar="TAG", help="use only lines of the lists with this tag", unset="all")
    min_clip_score: float | None = option(None, help="a lower raw cosine of picture and caption goes")
    max_attempts: int | None = option(None, help="a picture that took more seeds than this goes")
    drop_reason: tuple[str, ...] = option(
        (), metavar="REASON", help="a stored row with this remark goes, such as prompt_truncated"
    )
    min_words: int | None = option(None, help="a shorter caption goes")
    max_words: int | None = option(None, help="a longer caption goes")
    keep_word: tuple[str, ...] = option((), metavar="WORD", help="a caption with none of these words goes")
    drop_word: tuple[str, ...] = option((), metavar="WORD", help="a caption with one of these words goes")
    covered_by: int | None = option(
        None, metavar="K",
        help="concept coverage: a row goes unless CLIP finds each concept that its caption names among the K nearest "
        "to the picture",
    )  # fmt: skip
    min_coverage: float = option(1.0, help="with --covered-by: the share of the caption's concepts that must be found")
    duplicate_captions: float | None = option(
        None, metavar="X",
        help="where captions have sets of words with a Jaccard index of X or more, the best score stays; 1 "
        "is the same words",
    )  # fmt: skip
    duplicate_pictures: float | None = option(
        None, metavar="X", help="the same by the cosine of the pictures' global CLIP features, such as 0.97"
    )
    drop_lowest: float | None = option(None, metavar="SHARE", help="the share of rows with the lowest scores goes")
    drop_lowest_per_concept: float | None = option(
        None, metavar="SHARE",
        help="a row goes if it is in this lowest share among the rows of each concept that its caption names; rows "
        "that name none are a group too",
    )  # fmt: skip
    max_per_concept: int | None = option(
        None, metavar="N", help="quota: at most N rows name the same concept; those with the best scores stay"
    )
    subset: Subset | None = option(
        None, metavar="N|SHARE", parse=Subset.parse,
        help="a random subset by --seed; a smaller one is contained in a larger one", unset="all rows",
    )  # fmt: skip
    seed: int = option(0, help="seed of --subset")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_attempts", "min_words", "max_words", "covered_by", "max_per_concept")
        for name, least, most in (
            ("min_clip_score", -1.0, 1.0),
            ("min_coverage", 0.0, 1.0),
            ("duplicate_captions", 0.0, 1.0),
            ("duplicate_pictures", 0.0, 1.0),
            ("drop_lowest", 0.0, 1.0),
            ("drop_lowest_per_concept", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{flag(type(self), name)} {value}: must be from {least:g} to {most:g}")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise InputError(f"--min-words {self.min_words}, --max-words {self.max_words}: no caption has both")
        for name in ("duplicate_captions", "duplicate_pictures"):
            if getattr(self, name) == 0:
                raise InputError(f"{flag(type(self), name)} 0: every two rows are alike; give a number above 0")
        for name, least in (
            ("min_clip_score", -1),
            ("min_coverage", 0),
            ("drop_lowest", 0),
            ("drop_lowest_per_concept", 0),
        ):
            if getattr(self, name) == least:
                raise InputError(f"{flag(type(self), name)} {least}: no row would go; give a number above {least}")
        for name in ("keep_word", "drop_word"):
            if bad := [word for word in getattr(self, name) if not ONE_WORD.fullmatch(word)]:
                raise InputError(f"{flag(type(self), name)} {bad[0]!r}: must be one word; give the option once a word")
        if unknown := [reason for reason in self.drop_reason if reason not in MARKS]:
            raise InputError(
                f"--drop-reason {unknown[0]}: a stored row has no such remark; allowed: {', '.join(MARKS)}"
            )
        refuse_without(self, "covered_by", "min_coverage")
        refuse_without(self, "subset", "seed")
        if self.tag and not (self.keep_list or self.drop_list):
            raise InputError(f"--tag {self.tag[0]}: needs --keep-list or --drop-list")


@dataclass(frozen=True, kw_only=True)
class CurateRequest(RuleOptions):
    """Datasets, and the rules by which rows stay. Raises InputError for values that cannot be."""

    data: tuple[str, ...] = option(metavar="P", help="dataset or view: path or URI; several are merged")
    out: str | None = option(
        None,
        metavar="P",
        writes="folder",
        help="the view of the rows that stay: path or URI",
        unset="none; or --dry-run",
    )
    dry_run: bool = option(False, help="only say what would go, by rule, with examples")
    materialise: bool = option(False, help="write the pictures out: a dataset of its own in place of a view")
    unfinished: bool = option(
        False, help="use the shards that are there of a dataset that is being made or was piloted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise InputError("--data: give at least one dataset")
        if self.dry_run and (self.out is not None or self.materialise):
            raise InputError("--dry-run: writes nothing; leave --out and --materialise out")
        if not self.dry_run and self.out is None:
            raise InputError("--out: missing; or add --dry-run")

    @property
    def rules(self) -> Sequence[str]:
        """Fields of the rules that are given."""
        return [name for name in given(self) if name in RuleOptions.__dataclass_fields__]
