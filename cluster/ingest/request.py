"""What a user asks of ingest: `FeaturiseRequest` and `ImportRequest`, and the options that both have."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.dataset.request import ShardOptions
from cluster.options import Request, check_at_least, option, parse_setting, refuse_others, refuse_without
from pcm.errors import InputError
from pcm.official.settings import CLIP_SCORE_SCALE, SETTINGS, check_settings
from pcm.spec import DEVICES, DTYPES
from pcm.text.detect import FORMATS


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(ShardOptions):
    """Machine."""

    workers: int = option(min(16, 2 * (os.cpu_count() or 4)), help="threads that read")
    device: str = option("auto", choices=DEVICES, help="where CLIP runs; auto is cuda where there is a GPU")
    dtype: str = option(
        "auto", choices=("auto", *DTYPES), help="precision of CLIP; auto is bfloat16 on GPUs, float32 on CPUs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "shard_size", "workers")


@dataclass(frozen=True, kw_only=True)
class FeaturiseRequest(ReadingOptions):
    """Real photos to make a dataset of, or a dataset to featurise by another CLIP; paths or URIs.

    `images` as in `cluster.sources.pictures.PictureSource`, `captions` any file that `cluster.sources.corpus` reads,
    with the photo of each caption. Raises InputError for options that do not go together.
    """

    images: str | None = option(
        None,
        metavar="P",
        help="folder of JPEG, PNG or WebP files, Parquet with image_id and image, embedded:val, embedded:test",
        unset="required without --data",
    )
    captions: str | None = option(
        None,
        metavar="P",
        help="Karpathy or COCO JSON, Flickr token, CSV, JSONL or Parquet that names the photo of each caption",
        unset="required without --data",
    )
    data: str | None = option(
        None,
        metavar="P",
        help="a dataset or view, whose pictures get the features and scores of --clip",
        unset="none; --images and --captions instead",
    )
    unfinished: bool = option(
        False, help="with --data: use the shards that are there of a dataset that is being made or was piloted"
    )
    out: str = option(metavar="P", writes="folder", help="dataset: path or URI")
    clip: str = option(
        "embedded",
        metavar="NAME",
        help="open_clip NAME, such as ViT-L-14/openai; to mix with another dataset, give its CLIP",
    )
    split: str = option("train", help="split of a Karpathy file (train takes restval too), or all")
    limit: int | None = option(None, help="the captions of the first N photos of the file only", unset="all")
    concepts: str | None = option(
        None, metavar="P", help="concepts of captioners: a published pickle or concepts.safetensors",
        unset="the captions' own 400 most frequent nouns; with --data those of the dataset",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "limit")
        if self.clip == "null":
            raise InputError("--clip null: has no features; give an open_clip model or 'embedded'")
        if self.data is not None:
            of_both = ("out", "clip", "concepts", "device", "dtype", "unfinished")
            refuse_others(self, "data", of_both, why="which has captions, pictures and shards")
            return
        refuse_without(self, "data", "unfinished")
        for name in ("images", "captions"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}: missing; give --images and --captions, or --data with a dataset")


@dataclass(frozen=True, kw_only=True)
class DatasetFiles(ReadingOptions):
    """A dataset."""

    annotations: str | None = option(None, metavar="PICKLE", help="pickled list of annotations")
    images: str | None = option(
        None, metavar="P",
        help="folder of IMAGE_ID.jpg; {split_id} in it is replaced, as in images/coco_sp{split_id}",
        unset="required with --annotations",
    )  # fmt: skip
    features: str | None = option(
        None, metavar="P", help="folder of IMAGE_ID.npz, likewise", unset="computed with --clip"
    )
    clip_head: str | None = option(
        None, metavar="PTH", help="take the CLIP head of this checkpoint", unset="that of --clip, loaded"
    )
    captions: str | None = option(
        None, metavar="P", help="the sentences as written, any caption file", unset="from the word ids"
    )
    captions_format: str = option("auto", choices=("auto", *FORMATS), help="format of --captions; auto detects it")
    captions_split: str = option("train", metavar="NAME", help="split of a Karpathy file")
    clip_score_scale: float = option(
        CLIP_SCORE_SCALE, metavar="X", help="what the cosine was multiplied by in clipscore: 2.5 in SynthImgCap, 5 in "
        "SynC's refined annotations, whose cosine is of SigLIP2",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CaptionerFiles(Request):
    """A captioner."""

    checkpoint: str | None = option(None, metavar="PTH", help="published .pth")
    settings: Mapping[str, Any] = option(
        {}, flag="set", metavar="FIELD=VALUE", parse=parse_setting,
        help=f"what a checkpoint does not show: {', '.join(SETTINGS)}", unset="as published",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImportRequest(CaptionerFiles, DatasetFiles):
    """Published files to make a dataset or a captioner of; paths or URIs.

    `{split_id}` in `images` and `features` is each picture's own. `clip`: that which made the features, or is to make
    them. Raises InputError for options that do not go together.
    """

    out: str = option(metavar="P", writes="folder", help="dataset or captioner: path or URI")
    vocabulary: str = option(metavar="P", help="vocabulary.txt")
    clip: str = option(metavar="NAME", help="the open_clip NAME of the features, such as ViT-L-14/openai")
    concepts: str | None = option(
        None, metavar="P", help="concept pickle (or ours)", unset="built with --clip for a dataset; else required"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.annotations) == bool(self.checkpoint):
            raise InputError("--annotations, --checkpoint: give one of the two, for a dataset or a captioner")
        if self.checkpoint is not None:
            if not self.concepts:
                raise InputError("--concepts: missing; a captioner needs the concept file it was trained with")
            of_both = ("out", "vocabulary", "clip", "concepts", "settings")
            refuse_others(self, "checkpoint", of_both, why="which is a captioner")
            check_settings(self.settings)
            return
        if not 0 < self.clip_score_scale < float("inf"):
            raise InputError(f"--clip-score-scale {self.clip_score_scale:g}: must be a number above 0")
        if not self.images:
            raise InputError("--images: missing; a dataset is its pictures, give their folder")
        refuse_without(self, "checkpoint", "settings")
        if self.features is not None and (self.device != "auto" or self.dtype != "auto"):
            raise InputError("--device, --dtype: without effect beside --features, which are computed; leave them out")
        refuse_without(self, "captions", "captions_format", "captions_split")
