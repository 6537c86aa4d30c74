"""What a user asks of refinement: a dataset, a method and its settings, and where the refined rows go."""

from dataclasses import dataclass

from cluster.curation.redraw.settings import CHOICES, LOWEST, MONEY, PICTURES, UNITS, Policy
from cluster.curation.sync.settings import SyncSettings
from cluster.options import Request, check_at_least, flag, given, option, refuse_without
from pcm.errors import InputError
from pcm.spec import DEVICES

SYNC, BEST_OF_N, REDRAW = "sync", "best-of-n", "redraw"
METHODS = (SYNC, BEST_OF_N, REDRAW)


@dataclass(frozen=True, kw_only=True)
class SyncOptions(Request):
    """SynC."""

    candidates: int = option(
        SyncSettings.candidates, metavar="K", help="pictures considered for a caption: the nearest by CLIP"
    )
    captions_per_picture: int = option(
        SyncSettings.captions_per_picture, metavar="K_R", help="captions that stand for a picture: the nearest by CLIP"
    )
    keep: float = option(SyncSettings.keep, metavar="TAU", help="share of the captions that stays: the best scores")
    probes: int | None = option(
        None, metavar="P",
        help="look for the nearest in P cells of the vectors alone; the summary says what share this finds. For more "
        "than some ten million pairs",
        unset="all captions are compared with all pictures",
    )  # fmt: skip
    sentences: str | None = option(
        None, metavar="NAME",
        help="compares captions: a sentence-transformers repo or folder, or clip, the text tower of the CLIP that "
        "finds the pictures (the dataset's, or that of --retrieval)",
        unset="the published paraphrase-multilingual-MiniLM-L12-v2 where sentence-transformers is installed, else clip",
    )  # fmt: skip

    @property
    def settings(self) -> SyncSettings:
        return SyncSettings(self.candidates, self.captions_per_picture, self.keep, self.probes)


@dataclass(frozen=True, kw_only=True)
class RedrawOptions(Request):
    """Best-of-n and redraw. What a picture took is told by the source's statistics, once, before the first is drawn."""

    best_of: int = option(4, metavar="N", help="best-of-n: pictures of each caption, the stored one among them")
    budget: float | None = option(
        None, metavar="X", help="redraw: what may be spent, in --budget-in", unset="required with --method redraw"
    )
    budget_in: str = option(
        PICTURES, choices=UNITS,
        help="unit of --budget: pictures; seconds of a GPU (or of a generator on CPUs); money, by "
        "--price-per-hour",
    )  # fmt: skip
    price_per_hour: float | None = option(None, help="with --budget-in money: of a GPU, or a generator on CPUs")
    choose: str = option(
        Policy.choose, choices=CHOICES,
        help="redraw: gain, where a picture is expected to gain most; lowest, the lowest scores",
    )  # fmt: skip
    lowest: float = option(
        Policy.lowest, metavar="SHARE", help="with --choose lowest: only among this share of the rows"
    )
    rounds: int = option(4, metavar="N", help="redraw: after how many parts of the budget it is chosen anew")
    t2i: str | None = option(
        None, metavar="NAME",
        help="the dataset's own generator: needed where it is a folder, file or hub repo",
        unset="as the dataset names it",
    )  # fmt: skip
    t2i_config: str | None = option(
        None, metavar="NAME", help="needed where the generator is a single file of weights: its own repo or folder",
    )  # fmt: skip
    vae: str | None = option(None, metavar="NAME", help="needed where the dataset was drawn with --vae: that decoder")
    lora: tuple[str, ...] = option(
        (), metavar="REPO_OR_FILE",
        help="needed where the dataset was drawn with --lora: the same in the same order; weights are the dataset's",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RefineRequest(RedrawOptions, SyncOptions):
    """A dataset to refine. Raises InputError for values that cannot be."""

    data: str = option(metavar="P", help="dataset or view: path or URI")
    out: str | None = option(
        None, metavar="P", writes="folder", help="the view of the refined rows: path or URI", unset="none; or --dry-run"
    )
    method: str = option(
        choices=METHODS,
        help="sync: each caption gets the picture that fits it best, and the best stay; best-of-n: n pictures of each "
        "caption, the best by score kept; redraw: a new picture where it pays, the better of the two kept",
    )
    clip: str | None = option(
        None, metavar="NAME",
        help="the dataset's own CLIP, to encode captions: needed where it is a folder, file or hub repo",
        unset="as the dataset names it",
    )  # fmt: skip
    retrieval: str | None = option(
        None, metavar="P",
        help="the same dataset with another CLIP's features (jobs.featurise --data), which finds the pictures; scores "
        "stay those of the dataset's own CLIP", unset="the dataset's own features",
    )  # fmt: skip
    retrieval_clip: str | None = option(
        None, metavar="NAME",
        help="the CLIP of --retrieval: needed where it is a folder, file or hub repo", unset="as --retrieval names it",
    )  # fmt: skip
    block_size: int = option(4096, metavar="N", help="captions or pictures of a task; does not change the result")
    device: str = option(
        "auto", choices=DEVICES, help="where vectors are made and compared; auto: cuda if there is one"
    )
    dry_run: bool = option(
        False, help="best-of-n, redraw: only say how many pictures would be drawn, in what time, and what they are "
        "expected to gain",
    )  # fmt: skip
    materialise: bool = option(False, help="write the pictures out: a dataset of its own in place of a view")
    unfinished: bool = option(
        False, help="use the shards that are there of a dataset that is being made or was piloted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        listened = _OF_ALL + _OF_METHOD[self.method]
        if useless := [name for name in given(self) if name not in listened]:
            flags = ", ".join(flag(type(self), name) for name in useless)
            raise InputError(f"{flags}: without effect with --method {self.method}; leave it out")
        check_at_least(self, 1, "candidates", "captions_per_picture", "probes", "block_size", "rounds")
        check_at_least(self, 2, "best_of")
        if self.method == REDRAW:
            self._check_budget()
        if self.dry_run and (self.out is not None or self.materialise):
            raise InputError("--dry-run: writes nothing; leave --out and --materialise out")
        if not self.dry_run and self.out is None:
            raise InputError("--out: missing" + ("" if self.method == SYNC else "; or add --dry-run"))
        if not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep:g}: must be above 0 and at most 1")
        refuse_without(self, "retrieval", "retrieval_clip")

    def _check_budget(self) -> None:
        if self.budget is None:
            raise InputError("--budget: missing; say what may be spent, in --budget-in")
        if not 0 < self.budget < float("inf"):
            raise InputError(f"--budget {self.budget:g}: must be above 0")
        if self.budget_in == PICTURES and self.budget != int(self.budget):
            raise InputError(f"--budget {self.budget:g}: must be a whole number of pictures")
        if (self.budget_in == MONEY) != (self.price_per_hour is not None):
            raise InputError("--price-per-hour: give it with --budget-in money, and only then")
        if self.price_per_hour is not None and not 0 < self.price_per_hour < float("inf"):
            raise InputError(f"--price-per-hour {self.price_per_hour:g}: must be above 0")
        if not 0 < self.lowest <= 1:
            raise InputError(f"--lowest {self.lowest:g}: must be above 0 and at most 1")
        if self.choose != LOWEST and self.lowest != Policy.lowest:
            raise InputError(f"--lowest {self.lowest:g}: needs --choose lowest")


#: Which options a method listens to.
_OF_ALL = ("data", "out", "method", "clip", "materialise", "unfinished")
_PLACES = ("t2i", "t2i_config", "vae", "lora")
_OF_METHOD = {
    SYNC: (*SyncOptions.__annotations__, "retrieval", "retrieval_clip", "block_size", "device"),
    BEST_OF_N: ("best_of", *_PLACES, "dry_run"),
    REDRAW: ("dry_run", "budget", "budget_in", "price_per_hour", "choose", "lowest", "rounds", *_PLACES),
}
