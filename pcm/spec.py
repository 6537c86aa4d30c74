"""Everything that determines the pixels and features of a dataset, as one frozen, hashable, printable record."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pcm.errors import InputError
from pcm.images import IMAGE_FORMATS

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

#: How the denoiser attends. default: what diffusers chooses (fused, in torch 2); sdpa: fused, whatever diffusers
#: chooses; eager: the whole score matrix in memory, what the others are measured against.
ATTENTIONS = ("default", "sdpa", "eager")
#: torch.compile of the denoiser. max-autotune is missing on purpose: it picks kernels by timing them, so two workers
#: may round differently, and a picture would depend on who drew it.
COMPILE_MODES = ("none", "default", "reduce-overhead")

#: Bumped when the code starts to make other bytes from the same spec; part of the spec, so a resume is refused.
GENERATOR_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """A text-to-image model and how it is run. None means the model folder's own default."""

    model: str  # diffusers repo id, folder, "embedded" or "null"
    revision: str  # commit of the repo, or sha256 of the folder: never a moving name
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    width: int | None = None  # pixels
    height: int | None = None
    scheduler: str | None = None  # a diffusers scheduler class name
    negative_prompt: str | None = None
    prompt_template: str = "{caption}"
    dtype: str = "float32"
    device: str = "cpu"  # resolved: "cpu" or "cuda"
    batch_size: int = 8  # part of the spec: kernels round differently for another batch shape
    cpu_threads: int = 1  # likewise
    max_attempts: int = 3  # seeds tried before a defective picture is quarantined
    image_format: str = "jpeg"
    image_quality: int = 95
    # Changes to the scheduler's configuration, as (name, value) pairs sorted by name; a mapping is taken too.
    scheduler_options: tuple[tuple[str, str | int | float | bool], ...] = ()
    # From here on speed alone is meant, but kernels round differently: recorded and compared, yet not in the
    # seeds (pcm.generation.seeds).
    attention: str = "default"
    channels_last: bool = False  # convolutions in NHWC
    compile: str = "none"
    vae_slicing: bool = False  # decode a picture at a time: less memory
    vae_tiling: bool = False  # decode a large picture in overlapping tiles: less memory, other pixels near the seams
    prompt_cache: bool = False  # encode every distinct prompt alone, once: pays where captions repeat

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler_options", _sorted_pairs(self.scheduler_options))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("compile", self.compile, COMPILE_MODES)
        _check_choice("image format", self.image_format, IMAGE_FORMATS)
        _check_positive(self, "num_inference_steps", "batch_size", "cpu_threads", "max_attempts")
        if "{caption}" not in self.prompt_template:
            raise InputError(
                f"prompt template {self.prompt_template!r}: must contain {{caption}}; write it where the caption goes"
            )
        if not 1 <= self.image_quality <= 100:
            raise InputError(f"image quality {self.image_quality}: allowed are 1 to 100")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % 8):
                raise InputError(f"{name} {value}: must be a positive multiple of 8 pixels")

    def prompt(self, caption: str) -> str:
        return self.prompt_template.replace("{caption}", caption)


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The frozen CLIP that scores and featurises."""

    model: str  # open_clip "architecture/pretrained", folder, checkpoint file, "embedded" or "null"
    revision: str
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 32
    cpu_threads: int = 1

    def __post_init__(self) -> None:
        _check_choice("CLIP dtype", self.dtype, DTYPES)
        _check_positive(self, "batch_size", "cpu_threads")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Generator, CLIP and seed: with the corpus, all that decides a dataset's bytes."""

    generator: GeneratorSpec
    clip: ClipSpec
    seed: int = 0
    images_per_caption: int = 1
    generator_version: int = field(default=GENERATOR_VERSION)

    def __post_init__(self) -> None:
        _check_positive(self, "images_per_caption")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "DatasetSpec":
        rest = {key: value for key, value in values.items() if key not in ("generator", "clip")}
        return DatasetSpec(generator=GeneratorSpec(**values["generator"]), clip=ClipSpec(**values["clip"]), **rest)

    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: "DatasetSpec") -> list[str]:
        """Fields in which `other` differs, as "generator.guidance_scale: 7.5 -> 2.0"."""
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        return [f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}" for key in mine if mine.get(key) != theirs.get(key)]


def _sorted_pairs(options: object) -> tuple[tuple[str, str | int | float | bool], ...]:
    pairs = options.items() if isinstance(options, Mapping) else options
    return tuple(sorted((str(name), value) for name, value in pairs))  # type: ignore[attr-defined]  # JSON gives lists


def _flatten(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{what} {value!r}: allowed are {', '.join(allowed)}")


def _check_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
