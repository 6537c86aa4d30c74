"""What the experiments are: domains, the network and schedule that all runs share, and the variants of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.ingest.text_only import TEXT_ONLY_SETTINGS
from pcm.embedded.making.world import DOMAINS as DOMAINS_OF_THE_WORLD


@dataclass(frozen=True)
class Domain:
    """A kind of scenes: a corpus of captions to draw, and real pictures (never drawn by the model) to caption."""

    name: str
    corpus: str  # of jobs.generate
    validation: str  # PictureSource.images; the references lie in the same file
    test: str


def _embedded(name: str) -> Domain:
    world = DOMAINS_OF_THE_WORLD[name]
    validation, test = (f"embedded:{world.test_sets[split]}" for split in ("val", "test"))
    return Domain(name, corpus=world.corpus, validation=validation, test=test)


DOMAINS = {name: _embedded(name) for name in DOMAINS_OF_THE_WORLD}
MAIN, OTHER = DOMAINS

#: Captions of a domain's corpus that are drawn, and pictures in a shard.
CAPTIONS = 3000
SHARD_SIZE = 125

#: Fields of cluster.training.config.TrainConfig in which every run differs from the preset `embedded`.
PRESET = "embedded"
BASE: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "batch_size": 16,
    "epochs": 3,
    "ema_decay": 0.99,
    "warmup_steps": 300,
    "lr_factor": 0.4,
}
#: How often each caption is trained on between two validations ("epoch" above). With a fraction f of the captions it is
#: 1 / f times as often, so that every run has the same number of steps and of validations.
PASSES = 2.0

#: w of eq. 11 is chosen by the data: w = factor / (mean cosine of the domain's pairs). The paper's are 4 x 0.25 = 1.0
#: for ViT-L/14 and about 2.5 x 0.31 = 0.8 for ViT-B/32.
CLIP_FACTOR = 1.0
#: Weighs every pair 1: without CXE.
NO_CXE = 1e6

SEEDS = 3
FIRST_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: trained once a seed, on a domain's data."""

    name: str
    domain: str = MAIN
    data: str = "drawn"  # drawn by the text-to-image model, rendered (perfect pictures), or text (no pictures)
    clip_factor: float | None = CLIP_FACTOR  # None: no CXE
    overrides: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    also_on: tuple[str, ...] = ()  # other domains whose test pictures are captioned too

    @property
    def passes(self) -> float:
        return PASSES / self.overrides.get("fraction", 1.0)


@dataclass(frozen=True)
class Experiment:
    """One table of RESULTS.md."""

    title: str
    variants: tuple[Variant, ...]
    note: str = ""
    #: What is varied in a curve: field name; "" where the rows are unordered.
    curve: str = ""


def _ablation(domain: str) -> tuple[Variant, ...]:
    others = tuple(name for name in DOMAINS if name != domain)
    parts: dict[str, dict[str, Any]] = {
        "base": {"clip_factor": None, "overrides": {"top_patches": 0}},
        "base + mix-up": {"clip_factor": None},
        "base + CXE": {"overrides": {"top_patches": 0}},
        "both (PCM-Net)": {},
    }
    return tuple(Variant(name=name, domain=domain, also_on=others, **settings) for name, settings in parts.items())


def _curve(name: str, values: tuple[Any, ...], **settings: Any) -> tuple[Variant, ...]:
    """Variants of PCM-Net in which one field has these values; its default is the ablation's own run."""
    return tuple(Variant(name=f"{name} = {value}", overrides={name: value}, **settings) for value in values)


FULL = Variant(name="both (PCM-Net)", also_on=tuple(name for name in DOMAINS if name != MAIN))


def _with_full(variants: tuple[Variant, ...], name: str, at: int) -> tuple[Variant, ...]:
    full = Variant(name=name, also_on=FULL.also_on)
    return (*variants[:at], full, *variants[at:])


EXPERIMENTS: Mapping[str, Experiment] = {
    "ablation": Experiment("Ablation", _ablation(MAIN)),
    "data": Experiment(
        "Data efficiency",
        _with_full(
            tuple(Variant(name=f"{percent} %", overrides={"fraction": percent / 100}) for percent in (10, 20, 40)),
            "100 %",
            3,
        ),
        "Every row has the same number of training steps: a tenth of the captions is seen ten times as often.",
        curve="fraction",
    ),
    "K": Experiment(
        "K, concepts a picture",
        _with_full(_curve("top_concepts", (1, 7)), "top_concepts = 5", 1),
        curve="top_concepts",
    ),
    "M": Experiment(
        "M, selected (patch, concept) pairs",
        _with_full(_curve("top_patches", (1, 10)), "top_patches = 5", 1),
        curve="top_patches",
    ),
    "w": Experiment(
        "w, weight of the clip score",
        _with_full(
            tuple(Variant(name=f"w x mean cosine = {factor}", clip_factor=factor) for factor in (0.5, 0.75)),
            "w x mean cosine = 1.0",
            2,
        ),
        curve="clip_weight",
    ),
    "focal": Experiment(
        "Focal factor",
        _with_full((Variant(name="off", overrides={"focal_mode": "off"}),), "on (gamma 2, batch)", 0),
    ),
    "threshold": Experiment(
        "Mix-up threshold (probability of a concept)",
        _with_full(_curve("concept_threshold", (0.1, 0.3)), "concept_threshold = 0.0", 0),
        curve="concept_threshold",
    ),
    "anchors": Experiment(
        "Anchors",
        (
            Variant(name="text only (CapDec-style)", data="text", clip_factor=None, overrides=TEXT_ONLY_SETTINGS),
            Variant(
                name="drawn pictures, global feature only",
                clip_factor=None,
                overrides={"use_patches": False, "top_patches": 0},
            ),
            *_with_full((), "drawn pictures, PCM-Net", 0),
            Variant(name="rendered pictures, base", data="rendered", clip_factor=None, overrides={"top_patches": 0}),
            Variant(name="rendered pictures, PCM-Net", data="rendered"),
        ),
    ),
    "cross": Experiment(
        "Trained on one domain, tested on both", (*_ablation(MAIN), _ablation(OTHER)[0], _ablation(OTHER)[-1])
    ),
}
