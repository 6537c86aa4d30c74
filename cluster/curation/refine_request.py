"""What a user asks of refinement: a dataset, a method and its settings, and where the refined rows go."""

from dataclasses import dataclass

from cluster.curation.sync.settings import SyncSettings
from cluster.options import Request, check_at_least, option, refuse_without
from pcm.errors import InputError
from pcm.spec import DEVICES

METHODS = ("sync",)


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
    sentences: str | None = option(
        None, metavar="NAME",
        help="compares captions: a sentence-transformers repo or folder, or clip, the text tower of the dataset's CLIP",
        unset="the published paraphrase-multilingual-MiniLM-L12-v2 where sentence-transformers is installed, else clip",
    )  # fmt: skip

    @property
    def settings(self) -> SyncSettings:
        return SyncSettings(self.candidates, self.captions_per_picture, self.keep)


@dataclass(frozen=True, kw_only=True)
class RefineRequest(SyncOptions):
    """A dataset to refine. Raises InputError for values that cannot be."""

    data: str = option(metavar="P", help="dataset or view: path or URI")
    out: str = option(metavar="P", writes="folder", help="the view of the refined rows: path or URI")
    method: str = option(
        choices=METHODS, help="sync: each caption gets the picture that fits it best, and the best stay"
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
    materialise: bool = option(False, help="write the pictures out: a dataset of its own in place of a view")
    unfinished: bool = option(
        False, help="use the shards that are there of a dataset that is being made or was piloted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "candidates", "captions_per_picture", "block_size")
        if not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep:g}: must be above 0 and at most 1")
        refuse_without(self, "retrieval", "retrieval_clip")
