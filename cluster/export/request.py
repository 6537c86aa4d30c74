"""What a user asks of an export."""

import os
from dataclasses import dataclass

from cluster.dataset.request import RunOnOption
from cluster.options import check_at_least, flag, given, option
from cluster.shard_work import RAY
from pcm.errors import InputError

FORMATS = ("official", "webdataset", "huggingface")
#: A dataset of ours, for a view or what is there of an unfinished one.
DATASET = "dataset"
#: What the published code knows by name.
CORPORA = ("mscoco", "flickr30k")
_OF_OFFICIAL = ("name", "corpus", "val", "test", "max_length")


@dataclass(frozen=True, kw_only=True)
class ExportRequest(RunOnOption):
    """A dataset or a captioner to write in another format; paths or URIs. Raises InputError for values that cannot be.

    name: of the published folders `NAME_sp0`, ... max_length: tokens of a sentence with its end (both: official).
    """

    data: str | None = option(None, metavar="P", help="dataset or view: path or URI", unset="none; or --checkpoint")
    checkpoint: str | None = option(
        None, metavar="P", help="captioner or training run: path or URI", unset="none; or --data"
    )
    out: str = option(metavar="P", writes="folder", help="an empty place, or that of this very export: path or URI")
    to: str = option(
        choices=(*FORMATS, DATASET),
        help="a captioner: official only; dataset: a view, or what is there, with pictures",
    )
    unfinished: bool = option(False, help="export the shards that are there of a dataset that is not finished")
    name: str = option("synth", help="official: folders are NAME_sp0, NAME_sp1, ... and NAME, of real photos")
    corpus: str = option("mscoco", choices=CORPORA, help="official: CORPUS_caption_anno_train.pkl, as published")
    val: str | None = option(None, metavar="P", help="official: dataset of real photos, by jobs.featurise")
    test: str | None = option(None, metavar="P", help="official: the same for the test split")
    max_length: int = option(20, help="official: tokens of a sentence with its end")
    workers: int = option(min(16, 2 * (os.cpu_count() or 4)), help="threads of one process")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data) == bool(self.checkpoint):
            raise InputError("--data, --checkpoint: give one of the two")
        if self.checkpoint and self.to != "official":
            raise InputError(f"--to {self.to}: a captioner can be exported --to official only")
        for name in given(self):
            if name in _OF_OFFICIAL and (self.checkpoint or self.to != "official"):
                raise InputError(f"{flag(ExportRequest, name)}: is for a dataset --to official; leave it out")
            if name in ("workers", "unfinished", "run_on") and self.checkpoint:
                raise InputError(f"{flag(ExportRequest, name)}: is for a dataset; leave it out")
            if name == "workers" and self.to == DATASET:
                raise InputError("--workers: has no effect --to dataset; leave it out")
            if name == "workers" and self.run_on == RAY:
                raise InputError("--workers: threads of one process; leave it out with --run-on ray")
        check_at_least(self, 1, "workers")
