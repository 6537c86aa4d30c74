"""Every number that decides what a training run learns, as one frozen record, and the published presets."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pcm.captioners.pcmnet.config import BEAM_SIZE, PCMNetConfig
from pcm.captioners.pcmnet.loss_settings import LossSettings
from pcm.documents import read_document, typed_fields, typed_value
from pcm.errors import InputError, not_known
from pcm.spec import COMPILE_MODES

if TYPE_CHECKING:
    from pcm.records import FeatureShape  # whose module loads Arrow: --help would wait for it

PRECISIONS = ("auto", "float32", "bfloat16")
FEATURE_DTYPES = ("float16", "int8")
FIRST_EPOCHS = ("shuffled", "plan")

#: Fields of the network that are read off the dataset and cannot be chosen.
DATASET_SIZES = ("vocab_size", "patch_dim", "embed_dim", "num_patches", "num_concepts")

#: Fields that earlier releases recorded, passed over in reading a run of theirs.
RETIRED = ("window_shards",)

_WHAT = "training config"  # in messages


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The science of one run. What changes only speed or place (workers, caches, paths) is no part of it.

    Defaults are the published MSCOCO ViT-L/14 run (arXiv 2501.00437). Raises InputError for a value out of range.
    """

    #: The network; its sizes that come from the data are filled in by `for_dataset`.
    model: PCMNetConfig = field(default_factory=PCMNetConfig)

    epochs: int = 12
    #: Rows a step, over all workers together.
    batch_size: int = 32
    #: Of initial weights, hold-out, row order, dropout and noise.
    seed: int = 1234
    #: Noam schedule: linear warm-up over so many steps; its model size is model.hidden_size.
    warmup_steps: int = 10_000
    lr_factor: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    #: Every entry of the gradient is clipped to +-clip_value; 0 = off.
    clip_value: float = 0.1
    #: Each worker takes its share of a batch in so many parts, one after another: less memory, the same gradient. With
    #: focal_mode "batch", where every word weighs every other, the parts go through the network once more, forwards.
    grad_accumulation: int = 1
    #: Decay of a moving average of the weights, which is then validated and kept as the captioner; 0 = off.
    ema_decay: float = 0.0
    #: Of matrix products; auto = bfloat16 autocast on a GPU, float32 on a CPU.
    precision: str = "auto"
    #: torch.compile of the network: default, or reduce-overhead (CUDA graphs), for GPUs, which otherwise wait for
    #: kernels to be launched at small batches. Part of the science because kernels that are fused round, and a GPU's
    #: dropout draws, differently. Parts of a batch would have to go through another program: not with accumulation.
    compile: str = "none"
    #: Of patch features between a shard and the network: as stored, or rounded to 8 bits (pcm.kernels.quantised), which
    #: halves memory, caches and what goes to a GPU. Validation sees them as stored.
    feature_dtype: str = "float16"

    #: w of eq. 11: 4.0 for ViT-L/14, 2.5 for ViT-B/32.
    clip_weight: float = LossSettings.clip_weight
    label_smoothing: float = LossSettings.label_smoothing
    #: The focal factor of the published code, which the paper does not mention.
    focal_gamma: float = LossSettings.focal_gamma
    focal_mode: str = LossSettings.focal_mode

    #: shuffled: over all shards, as every later epoch; plan: shard by shard in the order in which they are made, so
    #: that training can start before there is a second one (what jobs.stream does).
    first_epoch: str = "shuffled"
    #: Share of the captions that is trained on, drawn by a hash of caption and seed: 0.2 contains 0.1.
    fraction: float = 1.0
    #: Pairs whose raw cosine is lower are not trained on; -1 keeps all.
    min_clip_score: float = -1.0

    #: The best epoch is chosen by CIDEr on validation pictures or, where none are given, on this fraction of the
    #: synthetic pairs, but not on many more than holdout_limit of them; they are then not trained on.
    holdout_fraction: float = 0.05
    holdout_limit: int = 1000
    #: Beam search of validation; 1 = greedy.
    validation_beam_size: int = BEAM_SIZE

    def __post_init__(self) -> None:
        counts = "epochs batch_size grad_accumulation warmup_steps holdout_limit validation_beam_size"
        for name in counts.split():
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "seed", 0 <= self.seed < 2**63, "from 0 to below 2**63")
        _check(self, "clip_value", self.clip_value >= 0, "at least 0")
        for name in ("lr_factor", "adam_eps"):
            _check(self, name, getattr(self, name) > 0, "above 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        _check(self, "fraction", 0 < self.fraction <= 1, "above 0 and at most 1")
        _check(self, "min_clip_score", -1 <= self.min_clip_score <= 1, "a cosine, from -1 to 1")
        _check(self, "holdout_fraction", 0 < self.holdout_fraction <= 0.5, "above 0 and at most 0.5")
        _check(self, "first_epoch", self.first_epoch in FIRST_EPOCHS, f"one of {', '.join(FIRST_EPOCHS)}")
        _check(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        _check(self, "compile", self.compile in COMPILE_MODES, f"one of {', '.join(COMPILE_MODES)}")
        fits = self.batch_size % self.grad_accumulation == 0
        _check(self, "grad_accumulation", fits, f"a divisor of batch_size, {self.batch_size}")
        if self.compile != "none":
            _check(self, "grad_accumulation", self.grad_accumulation == 1, f"1 with compile = {self.compile!r}")
        _check(self, "feature_dtype", self.feature_dtype in FEATURE_DTYPES, f"one of {', '.join(FEATURE_DTYPES)}")
        LossSettings(**self.loss_settings)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Arguments of pcm.CLIPWeightedCrossEntropy."""
        names = [entry.name for entry in dataclasses.fields(LossSettings)]
        return {name: getattr(self, name) for name in names}

    def for_dataset(
        self,
        *,
        vocab_size: int,
        features: "FeatureShape",
        num_concepts: int,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """This config with the network's sizes filled in, and `overrides` as in `with_overrides`.

        Both at once, because a setting may fit these sizes alone. Raises InputError where one does not fit them.
        """
        sizes = {"vocab_size": vocab_size, "num_concepts": num_concepts, **dataclasses.asdict(features)}
        return self._replaced(overrides or {}, sizes)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """This config with some fields replaced, the network's by their plain names: {"top_concepts": 3}.

        Strict as from_dict; the sizes that come from the dataset are refused too.
        """
        return self._replaced(overrides, {})

    def _replaced(self, overrides: Mapping[str, Any], sizes: Mapping[str, int]) -> Self:
        check_overrides(overrides)
        values = self.to_dict()
        values["model"] |= sizes
        for name, value in overrides.items():
            (values["model"] if name in values["model"] else values)[name] = value
        found = type(self).from_dict(values)
        words = found.model.vocab_size
        fits = found.validation_beam_size <= words  # else the first epoch would end with it
        _check(found, "validation_beam_size", fits, f"at most the size of the vocabulary, {words}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Strict: an unknown field or one of another type raises InputError naming it; RETIRED ones are passed over."""
        if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
            raise InputError(
                f"training config {values!r}: must be a JSON object of field: value, 'model' an object too"
            )
        model = PCMNetConfig(**typed_fields(PCMNetConfig, values.get("model", {}), _WHAT, prefix="model."))
        rest = {name: value for name, value in values.items() if name not in ("model", *RETIRED)}
        return cls(model=model, **typed_fields(cls, rest, _WHAT))

    @classmethod
    def from_json(cls, data: bytes | str, *, source: str) -> Self:
        """from_dict of a JSON file; `source` names it in errors."""
        try:
            values = read_document(data)
        except ValueError as error:
            raise InputError(f"{source}: not JSON ({error}); write an object of field: value") from None
        return cls.from_dict(values)

    def differences(self, other: "TrainConfig") -> dict[str, str]:
        """Fields in which `other` differs: {"epochs": "12 -> 20"}."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return {name: f"{mine[name]!r} -> {theirs[name]!r}" for name in mine if mine[name] != theirs[name]}


def settable_fields() -> dict[str, Any]:
    """Field -> type of all that can be chosen: TrainConfig's own, and the network's (the mix-up's among them)."""
    own = {name: kind for name, kind in typing.get_type_hints(TrainConfig).items() if name != "model"}
    network = {name: kind for name, kind in typing.get_type_hints(PCMNetConfig).items() if name not in DATASET_SIZES}
    return own | network


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises InputError for a field that is not known or comes from the dataset, and for a value of another type."""
    fields = settable_fields()
    for name, value in overrides.items():
        if name in DATASET_SIZES:
            raise InputError(f"{_WHAT} field {name!r}: comes from the dataset and cannot be set")
        if name not in fields:
            raise not_known(f"{_WHAT} field", name, fields)
        typed_value(f"{_WHAT} {name}", value, fields[name])


def file_overrides(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The overrides that a TrainConfig written as JSON means, whole or in part; the dataset's sizes are left out.

    Raises InputError as `check_overrides` does, naming `source`.
    """
    model = values.get("model", {})
    if not isinstance(model, Mapping):
        raise InputError(f"{source}: model {model!r}: must be an object of field: value")
    flat = {name: value for name, value in {**values, **model}.items() if name not in ("model", *DATASET_SIZES)}
    try:
        check_overrides(flat)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return flat


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model"} | values["model"]


def _check(config: TrainConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise InputError(f"{_WHAT} {name} = {getattr(config, name)!r}: must be {allowed}")


_PUBLISHED = PCMNetConfig(hidden_dropout=0.2)
_SMALL = PCMNetConfig(
    hidden_size=256,
    num_heads=4,
    intermediate_size=1024,
    num_encoder_layers=2,
    num_decoder_layers=2,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    visual_dropout=0.2,
    word_dropout=0.1,
    output_dropout=0.1,
)

#: The published runs (arXiv 2501.00437, section 4.1, and the released settings), and `embedded`, which is ours: a
#: network for the small embedded world that two CPU cores train in about two minutes.
TRAINING_PRESETS: Mapping[str, TrainConfig] = types.MappingProxyType(
    {
        "coco_l14": TrainConfig(model=PCMNetConfig(hidden_dropout=0.25), clip_weight=4.0),
        "coco_b32": TrainConfig(model=_PUBLISHED, clip_weight=2.5),
        "flickr30k_l14": TrainConfig(model=_PUBLISHED, clip_weight=4.0),
        "flickr30k_b32": TrainConfig(model=_PUBLISHED, clip_weight=2.5),
        # w times the cosine of a fair picture is about 1, as in the paper (4 * 0.25): here cosines are near 0.85.
        "embedded": TrainConfig(model=_SMALL, epochs=8, warmup_steps=200, lr_factor=0.4, clip_weight=1.2),
    }
)


def preset(name: str) -> TrainConfig:
    """Raises InputError for a name that is not in TRAINING_PRESETS."""
    if name not in TRAINING_PRESETS:
        raise not_known("preset", name, TRAINING_PRESETS)
    return TRAINING_PRESETS[name]


def default_preset(features: "FeatureShape") -> str:
    """The preset for features of these sizes: the paper's MSCOCO runs for CLIPs as large as theirs, else `embedded`."""
    if features.embed_dim < 512:
        return "embedded"
    return "coco_b32" if features.patch_dim <= 768 else "coco_l14"
