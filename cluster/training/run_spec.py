"""One training run, as its workers are told of it."""

from dataclasses import dataclass
from typing import Any

from cluster.dataset.together import Vocabularies
from cluster.sources.picture_source import PictureSource
from cluster.training.config import TrainConfig
from cluster.training.request import DataSource, TrainRequest


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What crosses to the workers: where the data is, where the run goes, and its science."""

    data: tuple[DataSource, ...]  # absolute paths or URIs
    out: str
    vocabularies: Vocabularies
    config: TrainConfig
    document: dict[str, Any]  # config.json of the run, also written into every checkpoint
    validation: PictureSource | None  # None: held-out synthetic pairs
    clip: str  # NAME of the CLIP for validation pictures
    cpu_threads: int
    device: str  # "cpu", or what Ray gives the worker ("auto", "cuda")
    checks: str  # a folder below the temporary one, by which a node's workers share which checksums were compared
    init_from: str | None = None  # the folder of a captioner, whose weights it begins with
    checkpoint_every_steps: int | None = None  # beside the one at the end of an epoch
    cache_bytes: int = TrainRequest.cache_bytes
    window_bytes: int = TrainRequest.window_bytes
    cache_dir: str | None = None  # local folder of a ShardCache
