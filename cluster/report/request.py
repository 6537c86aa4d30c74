"""What a user asks of a report."""

from dataclasses import dataclass
from typing import ClassVar

from cluster.options import BEGINS_ANEW, Request, check_at_least, option, refuse_without
from cluster.sources.picture_source import PictureSource
from pcm.errors import InputError
from pcm.spec import DEVICES


@dataclass(frozen=True, kw_only=True)
class ReportRequest(Request):
    """What to report on; paths or URIs. At least one of data, run, evaluation and sweep.

    Raises InputError for values that cannot be, and for a request of nothing.
    """

    AGAIN: ClassVar[str] = BEGINS_ANEW

    data: str | None = option(None, metavar="P", help="dataset or view")
    unfinished: bool = option(False, help="report on the shards that are there of a dataset that is not finished")
    run: str | None = option(None, metavar="P", help="run of jobs.train")
    evaluation: str | None = option(None, metavar="P", help="folder that jobs.evaluate wrote (its --out)")
    sweep: str | None = option(None, metavar="P", help="sweep of jobs.sweep")
    images: str | None = option(None, metavar="P", help="real pictures for the run's captioner: as for jobs.evaluate")
    references: str | None = option(
        None, metavar="P", help="their captions by people: as for jobs.evaluate",
        unset="the references column of --images",
    )  # fmt: skip
    split: str | None = option(
        None, metavar="NAME", help="the split of the references to use, such as test", unset="all"
    )
    out: str = option(metavar="FILE", writes="file", help="the HTML file: path or URI")
    title: str | None = option(None, metavar="TEXT", help="headline", unset="what is in the report")
    price_per_hour: float | None = option(
        None, help="price of one GPU, or of one machine on CPUs", unset="no cost is given"
    )
    seed: int = option(0, help="seed of the shards and pictures that are drawn at random")
    clip: str | None = option(None, metavar="NAME", help="CLIP to use, if the run's has moved", unset="the run's")
    device: str = option("auto", choices=DEVICES, help="where to caption; auto is cuda where there is a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((self.data, self.run, self.evaluation, self.sweep)):
            raise InputError("nothing to report on: give --data, --run, --evaluation or --sweep")
        refuse_without(self, "images", "references", "split", "clip", "device")
        if self.images is not None and self.run is None:
            raise InputError(f"--images {self.images}: needs --run, whose captioner describes the pictures")
        refuse_without(self, "data", "price_per_hour", "unfinished")
        if self.data is None and self.images is None and self.seed != ReportRequest.seed:
            raise InputError(f"--seed {self.seed}: needs --data or --images, of which it draws; leave it out")
        check_at_least(self, 0, "price_per_hour")
        if self.price_per_hour is not None and not self.price_per_hour < float("inf"):
            raise InputError(f"--price-per-hour {self.price_per_hour:g}: must be a number of at least 0")

    @property
    def pictures(self) -> PictureSource | None:
        """Real ones, which the run's captioner describes."""
        if self.images is None:
            return None
        return PictureSource(images=self.images, references=self.references, split=self.split)
