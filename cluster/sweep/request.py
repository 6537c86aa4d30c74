"""What a user asks of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from cluster.options import WITH_RESUME, check_at_least, check_gpu_share, option, shared
from cluster.sweep.search_space import ABLATIONS, DEFAULT_SPACE, SPEC_HELP, parse_domain, parse_param
from cluster.training.config import DATASET_SIZES, TRAINING_PRESETS, settable_fields
from cluster.training.request import PRESET_HELP, SettingsOptions, TrainRequest, parse_sources
from pcm.errors import InputError, not_known
from pcm.spec import DEVICES

SEARCHES = ("random", "grid", "optuna")
SCHEDULERS = ("asha", "none")


@dataclass(frozen=True, kw_only=True)
class SweepRequest(SettingsOptions):
    """Trainings on one dataset with other settings each. Raises InputError for values that cannot be.

    `params`: FIELD -> SPEC; empty: DEFAULT_SPACE, or the ablation's. `search` and `scheduler`: None chooses.
    """

    AGAIN: ClassVar[str] = WITH_RESUME

    data: str | tuple[str, ...] = option(metavar="DATASET[=WEIGHT]", help="dataset: local path or URI")
    out: str = option(writes="folder", help="where the sweep goes: local path or URI")
    trials: int | None = option(None, help="settings to try", unset="all of a grid; else required")
    params: Mapping[str, str] = option(
        {}, flag="param", metavar="FIELD=SPEC", parse=parse_param,
        help=f"vary this field of the config; SPEC: {SPEC_HELP}",
        unset=" ".join(f"{name}={spec}" for name, spec in DEFAULT_SPACE.items()),
    )  # fmt: skip
    ablation: str | None = option(None, choices=tuple(ABLATIONS), help="the paper's: K or M from 1 to 7, w from 1 to 6")
    search: str | None = option(
        None, choices=SEARCHES, help="how settings are chosen", unset="random, of an ablation grid"
    )
    scheduler: str | None = option(
        None, choices=SCHEDULERS, help="asha stops poor trials early", unset="asha, of an ablation none"
    )
    seeds: int = option(1, help="runs of every setting; the best is chosen by their mean")
    seed: int | None = option(None, help="the first seed, of trials and of the search", unset="the preset's")
    preset: str | None = option(
        None, choices=tuple(TRAINING_PRESETS), metavar="NAME", help=PRESET_HELP, unset="by the dataset's feature sizes"
    )
    clip: str | None = option(
        None, metavar="NAME", help="the dataset's CLIP, if it has moved: for --val-images, and recorded for captioning",
        unset="the dataset's",
    )  # fmt: skip
    concurrent: int | None = option(None, help="trials at a time", unset="as many as fit")
    cpus_per_trial: int = option(1, help="CPUs a trial reserves and uses")
    device: str = option(
        "auto", choices=DEVICES, help="auto is cuda where the cluster has a GPU; one that is named is waited for"
    )
    gpus_per_trial: float = option(1.0, metavar="SHARE", help="GPU a trial takes; with 0.25 four share one")
    resume: bool = option(False, help="continue the sweep in --out; finished trials are kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "trials", "seeds", "concurrent", "cpus_per_trial")
        check_gpu_share(self, "gpus_per_trial")
        parse_sources(self.data)
        if self.ablation is not None:
            if self.params or self.trials or self.search:
                raise InputError(
                    f"--ablation {self.ablation}: is a grid of its own; leave out --param, --trials and --search"
                )
            return
        for name, spec in self.params.items():
            if name not in settable_fields() and name not in DATASET_SIZES:
                raise not_known("--param", name, settable_fields())
            parse_domain(name, spec)
        if self.chosen_search != "grid" and self.trials is None:
            raise InputError(f"--search {self.chosen_search}: give --trials N")
        if self.chosen_search == "optuna" and self.seeds > 1:
            raise InputError(
                f"--seeds {self.seeds} with --search optuna: search with one seed, then run the best settings "
                "again with --search grid --seeds N"
            )

    @property
    def space(self) -> Mapping[str, str]:
        """FIELD -> SPEC of what is varied."""
        if self.ablation is not None:
            return ABLATIONS[self.ablation]
        return MappingProxyType(self.params) if self.params else DEFAULT_SPACE

    @property
    def chosen_search(self) -> str:
        return self.search or ("grid" if self.ablation else "random")

    @property
    def chosen_scheduler(self) -> str:
        return self.scheduler or ("none" if self.ablation else "asha")

    @property
    def train(self) -> TrainRequest:
        """The training that every trial varies; its `out` is the sweep's."""
        return TrainRequest(**shared(self, TrainRequest))
