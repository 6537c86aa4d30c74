"""What is compared: painters, data, networks, and in which order. All that is decided beforehand stands here, but for
learning rate and steps, which calibration.py finds on validation pictures.

Every run has the same number of steps, whatever its data: a smaller dataset is gone through more often.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pcm import embedded

#: Changes when runs.py begins to make other numbers of the same settings.
VERSION = 1


@dataclass(frozen=True)
class Painter:
    """A text-to-image model: the embedded one in so many steps, with this guidance, at `side` x `side` pixels."""

    steps: int
    guidance_scale: float
    side: int


#: "fine" is the embedded model as it is shipped; "coarse" has the defects of real text-to-image, from fewer steps and a
#: lower resolution. By the independent classifier a third of the things that it was asked for are wrong or missing
#: (34 % of those of 2,000 captions, in 41 % of the pictures); RESULTS.md has both painters' figures.
PAINTERS: Mapping[str, Painter] = MappingProxyType(
    {
        "fine": Painter(embedded.STEPS, embedded.GUIDANCE_SCALE, 64),
        "coarse": Painter(2, 3.0, 56),
    }
)
#: Beside the painters: the scenes as a perfect one would draw them.
RENDERED = "rendered"

CAPTIONS = 2000
SHARD_SIZE = 125

TEST_PICTURES = 2000
VALIDATION_PICTURES = 500
#: Of the scenes of the test and validation pictures; the pack's sets have other seeds.
SCENES_SEED = 6000

#: The classifier that judges pictures: rendered scenes it learns from and is checked on, and its steps.
JUDGE_SCENES = 8000
JUDGE_CHECK = 768
JUDGE_STEPS = 750

SEEDS = 8
FIRST_SEED = 1
#: "The same setting again" has these seeds more.
OTHER_SEEDS = 100

#: Fields of TrainConfig in which every run differs from the preset `embedded`.
BASE: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "visual_dropout": 0.1,
        "word_dropout": 0.1,
        "output_dropout": 0.1,
        "batch_size": 32,
        "warmup_steps": 200,
        "ema_decay": 0.995,
    }
)
#: w of eq. 11 is 1 / (mean cosine of what the painter drew), as in the paper: 4 x 0.25 for ViT-L/14.
CLIP_FACTOR = 1.0
#: Weighs every pair 1: without CXE.
NO_CXE = 1e6

#: Network -> (fields of TrainConfig, with CXE or without).
NETWORKS: Mapping[str, tuple[Mapping[str, Any], bool]] = MappingProxyType(
    {
        "base": ({"top_patches": 0}, False),
        "base + mix-up": ({}, False),
        "base + CXE": ({"top_patches": 0}, True),
        "both (PCM-Net)": ({}, True),
    }
)
PCM_NET = "both (PCM-Net)"

DRAWN, SYNC, SYNC_BY_SIGHT = "drawn", "SynC", "SynC by a classifier"
#: What the score filter keeps, and tau of SynC; and the other values of tau that are tried.
KEEP = 0.9
OTHER_TAUS = (0.5, 0.7, 1.0)
#: How many times as long a training is that shows whether the others are long enough.
LONGER = 3
BEST_OF = 4
#: Pictures that redraw may draw, as a share of the captions: 1.25 times the budget in all.
REDRAWN_SHARE = 0.25


@dataclass(frozen=True)
class Step:
    """A way to better data, as a request of jobs.curate or jobs.refine, and the data that it starts from."""

    of: str
    job: str  # "curate", "refine", or "classifier" (retrievers.py)
    options: Mapping[str, Any]
    drawn: float = 0.0  # pictures drawn for it beside those of DRAWN, as a share of the captions


def _sync(of: str = DRAWN, keep: float = KEEP, *, drawn: float = 0.0) -> Step:
    return Step(of, "refine", {"method": "sync", "keep": keep, "sentences": "clip"}, drawn=drawn)


STEPS_OF_DATA: Mapping[str, Step] = MappingProxyType(
    {
        "score filter": Step(DRAWN, "curate", {"drop_lowest": round(1 - KEEP, 6)}),
        SYNC: _sync(),
        **{f"SynC, tau {tau}": _sync(keep=tau) for tau in OTHER_TAUS},
        "score filter, SynC": _sync("score filter"),
        SYNC_BY_SIGHT: Step(DRAWN, "classifier", {}),
        "best of 4": Step(DRAWN, "refine", {"method": "best-of-n", "best_of": BEST_OF}, drawn=BEST_OF - 1),
        "redraw": Step(
            DRAWN, "refine", {"method": "redraw", "budget": round(REDRAWN_SHARE * CAPTIONS)}, drawn=REDRAWN_SHARE
        ),
        "best of 4, SynC": _sync("best of 4", drawn=BEST_OF - 1),
        "redraw, SynC": _sync("redraw", drawn=REDRAWN_SHARE),
    }
)


@dataclass(frozen=True)
class Setting:
    """One row of a table: data of a painter and a network, trained once a seed."""

    painter: str
    data: str = DRAWN
    network: str = "base"
    again: bool = False  # with other seeds
    longer: int = 1  # so many times the steps of the calibration

    def seeds(self, count: int) -> range:
        first = FIRST_SEED + (OTHER_SEEDS if self.again else 0)
        return range(first, first + count)


@dataclass(frozen=True)
class Part:
    """Settings that are run together, seed by seed, so that whatever is done is balanced."""

    title: str
    settings: tuple[Setting, ...]


def _refined(painter: str, names: tuple[str, ...]) -> tuple[Setting, ...]:
    return tuple(Setting(painter, data, network) for data in names for network in ("base", PCM_NET))


_REDRAWS = ("redraw", "redraw, SynC", "best of 4", "best of 4, SynC")

#: In the order in which they are run.
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "resolution": Part(
            "Resolution",
            (Setting("coarse"), Setting("coarse", again=True), Setting(RENDERED)),
        ),
        "coarse": Part("Four settings, coarse painter", tuple(Setting("coarse", network=name) for name in NETWORKS)),
        "fine": Part("Four settings, fine painter", tuple(Setting("fine", network=name) for name in NETWORKS)),
        "data": Part("SynC and the score filter", _refined("coarse", (SYNC, "score filter", SYNC_BY_SIGHT))),
        "longer": Part("More steps", (Setting("coarse", longer=LONGER),)),
        "tau": Part(
            "Other values of tau, and SynC of what the filter keeps",
            (
                *(Setting("coarse", f"SynC, tau {tau}") for tau in OTHER_TAUS),
                *_refined("coarse", ("score filter, SynC",)),
            ),
        ),
        "redraws": Part("Drawing more", _refined("coarse", _REDRAWS)),
        "data-fine": Part("SynC and the score filter, fine painter", _refined("fine", (SYNC, "score filter"))),
        "redraws-fine": Part("Drawing more, fine painter", _refined("fine", _REDRAWS)),
        "rendered": Part("PCM-Net on perfect pictures", (Setting(RENDERED, network=PCM_NET),)),
    }
)
