"""What a user asks of captioning: `EvaluateRequest` and `CaptionRequest`, and the options that both have."""

from dataclasses import dataclass
from typing import ClassVar

from cluster.evaluation.experiments import EXPERIMENTS, SPLIT, experiment
from cluster.options import (
    BEGINS_ANEW,
    Request,
    check_at_least,
    check_gpu_share,
    flag,
    given,
    option,
    refuse_others,
    refuse_without,
)
from cluster.sources.picture_source import FeatureSource, PictureSource
from pcm.captioners.pcmnet.config import BEAM_SIZE
from pcm.errors import InputError
from pcm.spec import DEVICES
from pcm.text.spice import SPICE_HOME_VARIABLE, SPICE_MODELS


@dataclass(frozen=True, kw_only=True)
class CaptionerOptions(Request):
    """Captioner."""

    AGAIN: ClassVar[str] = BEGINS_ANEW

    beam_size: int = option(BEAM_SIZE, help="hypotheses of beam search; 1 = greedy")
    clip: str | None = option(None, metavar="NAME", help="CLIP to use, if it has moved", unset="the checkpoint's")
    concepts: str | None = option(
        None, metavar="P", help="concept pickle as published, or concepts.safetensors", unset="the checkpoint's own"
    )
    device: str = option("auto", choices=DEVICES, help="where to run; auto is cuda where there is a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "beam_size")


@dataclass(frozen=True, kw_only=True)
class CaptionRequest(CaptionerOptions):
    """Picture files and folders to caption, or features; paths or URIs. Raises InputError for both, or neither."""

    images: tuple[str, ...] = option(
        (), positional=True, metavar="IMAGE_OR_FOLDER",
        help="JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF files, or folders of them",
        unset="with --features, none",
    )  # fmt: skip
    checkpoint: str | tuple[str, ...] = option(
        metavar="P", help="checkpoint or run of jobs.train: path or URI; several vote on each word"
    )
    features: str | None = option(
        None, metavar="P", help="caption these CLIP features instead: folder of IMAGE_ID.npz as published, or a dataset"
    )
    limit: int | None = option(None, help="the first features only", unset="all")
    out: str | None = option(
        None, metavar="FILE", writes="file", help="write captions and concepts there, as a COCO results file",
        unset="in the summary",
    )  # fmt: skip
    gpus_per_worker: float | None = option(
        None, metavar="SHARE", help="caption in a worker of a cluster, which takes so much GPU and sees the same files",
        unset="in this process, without Ray",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "limit")
        refuse_without(self, "features", "limit")
        if self.gpus_per_worker is not None:
            check_gpu_share(self, "gpus_per_worker")
        if self.features is None and not self.images:
            raise InputError("IMAGE_OR_FOLDER: missing; give picture files or folders, or --features")
        if self.features is not None:
            if self.images:
                raise InputError(f"--features {self.features}: give features or picture files, not both")
            if self.clip is not None:
                raise InputError(f"--clip {self.clip}: without effect beside --features; leave it out")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return _several(self.checkpoint)


def _several(checkpoint: str | tuple[str, ...]) -> tuple[str, ...]:
    return (checkpoint,) if isinstance(checkpoint, str) else tuple(checkpoint)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(CaptionerOptions):
    """Pictures with references, and a captioner or its captions; paths or URIs.

    Raises InputError for options that do not go together.
    """

    checkpoint: str | tuple[str, ...] | None = option(
        None, metavar="P", help="checkpoint or run of jobs.train: path or URI; several vote on each word",
        unset="required without --results",
    )  # fmt: skip
    every_epoch: bool = option(
        False, help="evaluate each epoch's checkpoint of the run, as far as it kept them (--keep-checkpoints)"
    )
    results: str | None = option(
        None, metavar="FILE", help="score this COCO results file instead; needs --references alone"
    )
    images: str | None = option(
        None, metavar="P", help="folder of pictures, Parquet with image_id and image, embedded:val, embedded:test",
        unset="required with --checkpoint, or --features",
    )  # fmt: skip
    features: str | None = option(
        None, metavar="P",
        help="CLIP features in place of pictures: folder of IMAGE_ID.npz as published, or a dataset; --clip is then "
        "for CLIPScore alone",
    )  # fmt: skip
    references: str | None = option(
        None, metavar="P", help="Karpathy or COCO JSON, Flickr token, CSV, JSONL, Parquet",
        unset="the references column of --images, the captions of a dataset",
    )  # fmt: skip
    split: str | None = option(
        None, metavar="NAME", help="the split of the references to use, such as test",
        unset=f"all, with --experiment {SPLIT}",
    )  # fmt: skip
    experiment: str | None = option(
        None, choices=tuple(EXPERIMENTS), metavar="NAME",
        help=f"put the paper's figures beside ours: {', '.join(EXPERIMENTS)}",
    )  # fmt: skip
    list_experiments: bool = option(False, help="show the paper's experiments and end")
    num_workers: int | None = option(None, help="caption on so many Ray actors", unset="in this process, without Ray")
    gpus_per_worker: float = option(
        1.0, metavar="SHARE", help="GPU an actor of --num-workers takes; with 0.5 two share one"
    )
    out: str | None = option(
        None,
        metavar="P",
        writes="folder",
        help="folder for captions.json (COCO results format) and metrics.json; with --every-epoch a folder an epoch",
    )
    limit: int | None = option(None, help="the first pictures by image id only", unset="all")
    spice_home: str | None = option(
        None, metavar="P", help=f"folder or URI with Stanford CoreNLP 3.6.0 for SPICE: {' and '.join(SPICE_MODELS)}",
        unset=f"the environment variable {SPICE_HOME_VARIABLE}; without one SPICE is null",
    )  # fmt: skip
    shuffled_baseline: bool = option(False, help="also CIDEr of the same captions given to other pictures")
    seed: int = option(0, help="seed of the shuffling")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_workers", "limit")
        refuse_without(self, "shuffled_baseline", "seed")
        refuse_without(self, "num_workers", "gpus_per_worker")
        check_gpu_share(self, "gpus_per_worker")
        if self.list_experiments:
            refuse_others(self, "list_experiments", (), why="which evaluates nothing")
            return
        if self.results is not None:
            for name in ("checkpoint", "images", "features", "concepts", "num_workers", "clip", "every_epoch"):
                if (value := getattr(self, name)) not in (None, False):
                    raise InputError(
                        f"{flag(EvaluateRequest, name)} {value}: without effect beside --results, which holds captions "
                        "already; leave it out"
                    )
            if useless := [name for name in ("beam_size", "device") if name in given(self)]:
                flags = ", ".join(flag(EvaluateRequest, name) for name in useless)
                raise InputError(
                    f"{flags}: without effect beside --results, which holds captions already; leave it out"
                )
            if self.references is None:
                raise InputError("--references is missing: what --results is scored with")
        else:
            if self.checkpoint is None:
                raise InputError(
                    "--checkpoint is missing: give a run of jobs.train, or --results with captions to score"
                )
            if (self.images is None) == (self.features is None):
                raise InputError("--images, --features: give one of the two, the pictures to caption")
            if self.features is not None and self.references is None and self.split is not None:
                raise InputError(f"--split {self.split}: needs --references; the captions of a dataset have no splits")
            if self.every_epoch and len(self.checkpoints) > 1:
                raise InputError("--every-epoch: takes one run as --checkpoint")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return () if self.checkpoint is None else _several(self.checkpoint)

    @property
    def pictures(self) -> PictureSource:
        """Pictures or features, references and the split: an experiment's own where none is given."""
        images = self.images or self.features or self.references
        assert images is not None
        split = self.split
        if self.experiment is not None and split is None and experiment(self.experiment).pictures != "NoCaps":
            split = SPLIT
        kind = PictureSource if self.features is None else FeatureSource
        return kind(images=images, references=self.references, split=split)
