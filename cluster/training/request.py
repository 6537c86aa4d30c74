"""What a user asks of training: `TrainRequest`, `StreamRequest`, and the options that jobs.sweep shares with them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cluster.generation.presets import GENERATION_PRESETS
from cluster.generation.request import GenerationOptions
from cluster.options import (
    WITH_RESUME,
    Request,
    check_at_least,
    check_gpu_share,
    option,
    options_of,
    parse_count,
    parse_label,
    parse_setting,
    refuse_without,
    shared,
    value_of,
)
from cluster.sources.picture_source import PictureSource
from cluster.training.config import (
    TRAINING_PRESETS,
    check_overrides,
    file_overrides,
    settable_fields,
)
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, not_known
from pcm.spec import DEVICES

_NETWORK = [name for name in settable_fields() if name in PCMNetConfig.__dataclass_fields__]
OVERRIDES_HELP = (
    "replace a field of the training config ("
    + ", ".join(name for name in settable_fields() if name not in _NETWORK)
    + ") or of the network and its mix-up ("
    + ", ".join(_NETWORK)
    + ")"
)
PRESET_HELP = ", ".join(TRAINING_PRESETS)
CONCEPTS_HELP = (
    "concepts in place of the dataset's: a published pickle or concepts.safetensors. The published runs, which the "
    "presets coco_* and flickr30k_* follow, all read one of 446 COCO nouns"
)


@dataclass(frozen=True)
class DataSource:
    """A dataset and how often each of its rows comes in an epoch."""

    uri: str
    weight: float = 1.0
    #: Of an unfinished dataset, for workers: the manifest of the shards that the driver found.
    manifest: bytes | None = None

    @staticmethod
    def parse(text: str) -> "DataSource":
        """Of "URI" or "URI=WEIGHT", such as s3://bucket/real=0.5. Raises InputError for a weight that is not above 0.

        Only a number after the last "=" is a weight.
        """
        refuse_credentials(text)  # also where the weight is wrong, and the error shows the text
        uri, equals, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            return DataSource(text)
        if not equals:
            return DataSource(text)
        if not (uri and 0 < weight <= 1000):
            raise InputError(f"--data {text}: write DATASET or DATASET=WEIGHT with a weight above 0, such as real=0.5")
        return DataSource(uri, weight)


def parse_worker_label(text: str) -> tuple[str, str]:
    """("pcmnet.io/role", "training") of "pcmnet.io/role=training". Raises InputError."""
    return parse_label(text, option="--worker-label", form="NAME=VALUE", example="pcmnet.io/role=training")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(Request):
    """Validation (without --val-images the best epoch is chosen on a held-out part of the synthetic pairs)."""

    val_images: str | None = option(
        None, metavar="P", help="choose the best epoch by CIDEr on these pictures: a folder, Parquet, embedded:val"
    )
    val_references: str | None = option(
        None, metavar="P", help="their references, in any format that jobs.evaluate reads",
        unset="the references column of --val-images",
    )  # fmt: skip
    val_split: str | None = option(None, metavar="NAME", help="the split of the references to use", unset="all")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_without(self, "val_images", "val_references", "val_split")

    @property
    def validation(self) -> PictureSource | None:
        """None: held-out synthetic pairs."""
        if self.val_images is None:
            return None
        return PictureSource(images=self.val_images, references=self.val_references, split=self.val_split)


@dataclass(frozen=True, kw_only=True)
class SettingsOptions(ValidationOptions):
    """What is learnt. An option given here wins over --set, that over the --config file, that over the preset."""

    overrides: Mapping[str, Any] = option(
        {}, flag="set", metavar="FIELD=VALUE", parse=parse_setting, help=OVERRIDES_HELP
    )
    epochs: int | None = option(None, help="passes over the data", unset="the preset's")

    #: Fields of the request that are fields of TrainConfig.
    OF_CONFIG: ClassVar[tuple[str, ...]] = ("epochs", "seed", "fraction", "min_clip_score")
    FILE_HELP: ClassVar[str] = "It may also hold fields of the training config, as a sweep's best.json does. "

    def __post_init__(self) -> None:
        super().__post_init__()
        check_overrides(self.overrides)
        preset: Any = getattr(self, "preset", None)
        if preset and set(settable_fields()) <= set(self.overrides):
            named = preset if isinstance(preset, str) else " ".join(preset)
            raise InputError(f"--preset {named}: without effect, every field is set; leave it or --config out")

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of TrainConfig that replace the preset's; an option of its own wins over `overrides`."""
        own = {name: getattr(self, name, None) for name in self.OF_CONFIG}
        return {**self.overrides, **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def settable(cls) -> Collection[str]:
        return settable_fields()

    @classmethod
    def file_fields(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """A field of TrainConfig is a setting, below --set. One that means something else as an option of this job is
        that option, unless the file has `model`, and so is a TrainConfig.
        """
        options = options_of(cls)
        names = {"model", *settable_fields()}
        if "model" not in values:
            names -= set(options) - set(cls.OF_CONFIG)
        found = {name: value for name, value in values.items() if name in names}
        rest = {name: value for name, value in values.items() if name not in names}
        if {"overrides", "set"} <= set(rest):
            raise InputError("--config: 'overrides' and 'set' are one option; give it once")
        given = rest.pop("overrides", rest.pop("set", None)) or {}
        settings = value_of(options["overrides"], Mapping[str, Any], given, shown="--config: set")
        return {**rest, "overrides": {**file_overrides(found, source="--config"), **settings}}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SettingsOptions):
    """Training."""

    fraction: float | None = option(
        None,
        help="train on this share of the captions; 0.2 contains 0.1. The steps shrink with it: as many as the "
        "paper's data efficiency takes --epochs 12/FRACTION",
        unset="the preset's, 1",
    )
    min_clip_score: float | None = option(
        None, help="train on pairs of at least this raw cosine", unset="the preset's, all"
    )
    device: str = option(
        "auto", choices=DEVICES, help="auto is cuda where the cluster has a GPU; one that is named is waited for"
    )
    num_workers: int | tuple[int, int] | None = option(
        None, metavar="N|MIN:MAX", parse=parse_count,
        help="DDP workers, or the least and most of a group that goes on as nodes come and go",
        unset="one a GPU, as far as they can share the batch, or one",
    )  # fmt: skip
    cpus_per_worker: int | None = option(
        None,
        help="CPUs a worker reserves and uses",
        unset="as many as the nodes have for each; one where there are none yet",
    )
    gpus_per_worker: float = option(
        1.0, metavar="SHARE", help="GPU a worker takes; a share, such as 0.5, lets several runs use one GPU and is for "
        "--num-workers 1",
    )  # fmt: skip
    worker_labels: Mapping[str, str] = option(
        {}, flag="worker-label", metavar="NAME=VALUE", parse=parse_worker_label,
        help="place workers on nodes with this label only, such as pcmnet.io/role=training",
    )  # fmt: skip
    keep_checkpoints: int = option(2, help="checkpoints that stay: those of the best epochs, besides the newest")
    checkpoint_every_steps: int | None = option(
        None, help="a crash costs N steps at most", unset="at the end of every epoch"
    )
    cache_dir: str | None = option(
        None, metavar="DIR",
        help="local folder (disk or /dev/shm) for features as raw arrays, 133 kB a row with ViT-L/14 (69 with --set "
        "feature_dtype=int8): decoded once a machine; yours to delete",
    )  # fmt: skip
    max_failures: int = option(3, help="lost workers before the run is given up")
    window_bytes: int = option(
        8 << 30, help="memory of a worker for the shards that its batches are mixed of, one for each row of its share; "
        "with less, a shard is read in parts, more than once",
    )  # fmt: skip
    #: Selections whose features take at most so many bytes in memory are decoded once.
    cache_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "num_workers", "cpus_per_worker", "keep_checkpoints", "checkpoint_every_steps", "window_bytes"
        )
        check_at_least(self, -1, "max_failures")
        check_gpu_share(self, "gpus_per_worker")
        if self.gpus_per_worker < 1 and self.num_workers != 1:
            raise InputError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: a share is for one worker, because workers exchange "
                "gradients from a GPU each; add --num-workers 1"
            )
        if "://" in (self.cache_dir or ""):
            raise InputError(f"--cache-dir {self.cache_dir}: must be a local folder, such as /dev/shm/pcm")


@dataclass(frozen=True, kw_only=True)
class TrainRequest(TrainingOptions):
    """A captioner to train. `data`: datasets, each "URI" or "URI=WEIGHT". Raises InputError for values that cannot be.

    `overrides`: fields of TrainConfig that replace the preset's.
    """

    AGAIN: ClassVar[str] = WITH_RESUME

    data: str | tuple[str, ...] = option(
        metavar="DATASET[=WEIGHT]",
        help="dataset: local path or URI. WEIGHT: how often each of its rows comes in an epoch (1)",
    )
    out: str = option(writes="folder", help="where the run goes: local path or URI")
    preset: str | None = option(
        None, choices=tuple(TRAINING_PRESETS), metavar="NAME", help=PRESET_HELP,
        unset="by the dataset's feature sizes; of a resumed run, its own settings",
    )  # fmt: skip
    seed: int | None = option(None, help="seed of weights, hold-out, order and dropout", unset="the preset's")
    concepts: str | None = option(None, metavar="P", help=CONCEPTS_HELP, unset="the dataset's own")
    init_from: str | None = option(
        None, metavar="P", help="begin with the weights and words of this captioner, a run's or a checkpoint's, and "
        "with its settings where no preset is named; schedule and optimiser begin anew", unset="random weights",
    )  # fmt: skip
    resume: bool = option(False, help="continue the run in --out exactly where it stopped")
    unfinished: bool = option(
        False, help="train on the shards that are there of a dataset that is being made or was piloted"
    )
    clip: str | None = option(
        None, metavar="NAME", help="the dataset's CLIP, if it has moved: for --val-images, and recorded for captioning",
        unset="the dataset's",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise InputError("--data: give at least one dataset")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return parse_sources(self.data)


def parse_sources(data: str | Sequence[str]) -> tuple[DataSource, ...]:
    return tuple(map(DataSource.parse, [data] if isinstance(data, str) else data))


@dataclass(frozen=True, kw_only=True)
class StreamRequest(GenerationOptions, TrainingOptions):
    """A dataset to make and a captioner to train on it meanwhile. One seed for both sides.

    `data`: the dataset; None: OUT/dataset, and the run is then OUT/run. `preset`: one of generation, one of training.
    Raises InputError for values that cannot be.
    """

    OF_CONFIG: ClassVar[tuple[str, ...]] = ("epochs", "fraction", "min_clip_score")
    FILE_HELP: ClassVar[str] = (
        "It may also hold fields of the training config; seed, batch_size and compile are generation's, unless "
        "the file has `model`, as a sweep's best.json has. "
    )

    out: str = option(writes="folder", help="where the run goes, or with no --data both: path or URI")
    data: str | None = option(
        None, writes="folder", help="dataset: path or URI", unset="OUT/dataset, and the run is then OUT/run"
    )
    preset: tuple[str, ...] = option(
        (), metavar="NAME",
        help=f"of generation ({', '.join(GENERATION_PRESETS)}), of training ({PRESET_HELP}), or both",
    )  # fmt: skip
    num_workers: int | tuple[int, int] | None = option(
        None, metavar="N", parse=parse_count, help="DDP workers of training", unset="one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_workers, tuple):
            raise InputError(
                f"--num-workers {self.num_workers[0]}:{self.num_workers[1]}: a stream's workers are as many from its "
                "beginning to its end, for generation takes what they leave; give one number"
            )
        for name in self.preset:
            if name not in GENERATION_PRESETS and name not in TRAINING_PRESETS:
                raise not_known("preset", name, [*GENERATION_PRESETS, *TRAINING_PRESETS])
        if len(self.preset) > len({name in GENERATION_PRESETS for name in self.preset}):
            raise InputError(
                f"--preset {' '.join(self.preset)}: give at most one of {', '.join(GENERATION_PRESETS)} and one of "
                f"{', '.join(TRAINING_PRESETS)}"
            )
        for name, why in (("seed", "--seed sets that of both sides"), ("first_epoch", "it is plan while streaming")):
            if name in self.overrides:
                raise InputError(f"--set {name}={self.overrides[name]}: {why}; leave it out")
        if not self.corpus and self.generation_preset is None:
            raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")

    @property
    def generation_preset(self) -> str | None:
        return next((name for name in self.preset if name in GENERATION_PRESETS), None)

    @property
    def dataset(self) -> str:
        from cluster.store.store import join

        return self.data or join(self.out, "dataset")

    @property
    def training(self) -> TrainRequest:
        """The other side: what jobs.train would be asked."""
        from cluster.store.store import join

        values = shared(self, TrainRequest) | {
            "data": self.dataset,
            "out": self.out if self.data else join(self.out, "run"),
            "concepts": None,  # the dataset has them
            "preset": next((name for name in self.preset if name in TRAINING_PRESETS), None),
        }
        return TrainRequest(**values)

    @classmethod
    def file_fields(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        if "model" in values:  # a whole TrainConfig: these two are decided elsewhere here
            values = {name: value for name, value in values.items() if name not in ("seed", "first_epoch")}
        return super().file_fields(values)
