"""Everything that determines the pixels and features of a dataset, as one frozen, hashable, printable record."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pcm.errors import InputError, NotKnown, known_fields
from pcm.images import IMAGE_FORMATS

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

#: How the denoiser attends. default: what diffusers chooses (fused, in torch 2); sdpa: fused, whatever diffusers
#: chooses; eager: the whole score matrix in memory, what the others are measured against.
ATTENTIONS = ("default", "sdpa", "eager")
#: torch.compile of the denoiser. max-autotune is missing on purpose: it picks kernels by timing them, so two workers
#: may round differently, and a picture would depend on who drew it.
COMPILE_MODES = ("none", "default", "reduce-overhead")

ACTIVATIONS = ("gelu", "quick_gelu")
#: How open_clip names the variant of an architecture that runs QuickGELU.
QUICK_GELU_SUFFIX = "-quickgelu"
#: Begins the revision of an open_clip tag whose commit on the hub is not known.
TAG_REVISION = "open_clip:"

#: Where a model lies while its GPU draws. model: each part of the pipeline comes from main memory when its turn comes;
#: sequential: each layer does, which needs least memory and is far slower.
OFFLOADS = ("none", "model", "sequential")

#: Bumped when the code starts to make other bytes from the same spec; part of the spec. A dataset that was begun under
#: an older version is finished under its rules.
#: 1: a folder's path entered the seeds and every file in it its revision; 50 steps and guidance 7.5 whatever the model.
#: 2: a folder is its revision, which covers what model_index.json names; steps and guidance are the pipeline's own.
GENERATOR_VERSION = 2
#: Begins the revision of what is no repo: a folder or a file is named by the digest of its bytes.
DIGEST = "sha256:"


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """A text-to-image model and how it is run. None means the model folder's own default."""

    model: str  # diffusers repo id, folder, "embedded" or "null"
    revision: str  # commit of the repo, or sha256 of the folder: never a moving name
    num_inference_steps: int = 50
    guidance_scale: float | None = 7.5  # None: the pipeline's own, or it has none
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
    # Keywords of the pipeline's call, likewise.
    pipeline_options: tuple[tuple[str, str | int | float | bool], ...] = ()
    loras: tuple[tuple[str, str, float], ...] = ()  # fused, in this order: (name, commit or sha256, weight)
    vae: str | None = None  # another decoder: repo id or folder
    vae_revision: str | None = None
    variant: str | None = None  # of the files of weights: "fp16"
    without: tuple[str, ...] = ()  # parts that are not loaded
    config: str | None = None  # of a single file of weights: the repo or folder that says what is in it
    config_revision: str | None = None
    # From here on speed alone is meant, but kernels round differently: recorded and compared, yet not in the
    # seeds (pcm.generation.seeds).
    attention: str = "default"
    channels_last: bool = False  # convolutions in NHWC
    compile: str = "none"
    vae_slicing: bool = False  # decode a picture at a time: less memory
    vae_tiling: bool = False  # decode a large picture in overlapping tiles: less memory, other pixels near the seams
    prompt_cache: bool = False  # encode every distinct prompt alone, once: pays where captions repeat
    offload: str = "none"

    def __post_init__(self) -> None:
        for name in ("scheduler_options", "pipeline_options"):
            object.__setattr__(self, name, _sorted_pairs(getattr(self, name)))
        object.__setattr__(self, "loras", tuple((name, digest, weight) for name, digest, weight in self.loras))
        object.__setattr__(self, "without", tuple(sorted(self.without)))
        _check_choice("offload", self.offload, OFFLOADS)
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

    def to_dict(self) -> dict:
        """Without the younger fields at their default, so that the digest of an older spec stays."""
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in LATER_FIELDS or value != defaults[name]}

    def without_places(self) -> "GeneratorSpec":
        """The same, every folder and file of the user's named by its digest alone, wherever it lies."""

        def named(name: str | None, revision: str | None) -> str | None:
            return revision if (revision or "").startswith(DIGEST) and name != "embedded" else name

        return dataclasses.replace(
            self,
            model=str(named(self.model, self.revision)),
            vae=named(self.vae, self.vae_revision),
            config=named(self.config, self.config_revision),
            loras=tuple((str(named(name, digest)), digest, weight) for name, digest, weight in self.loras),
        )

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
    #: What open_clip's architecture runs with the weights of "architecture/pretrained". None where the revision covers
    #: it (a folder, a hub repo), or where it was not known.
    activation: str | None = None
    weights: str | None = None  # "sha256:..." of the file of weights, where it is known before the model is loaded
    compile: str | None = None  # torch.compile of the image tower: a mode of COMPILE_MODES; None: not compiled

    def __post_init__(self) -> None:
        _check_choice("CLIP dtype", self.dtype, DTYPES)
        if self.activation is not None:
            _check_choice("CLIP activation", self.activation, ACTIVATIONS)
        if self.compile is not None:
            _check_choice("compile", self.compile, COMPILE_MODES)
        _check_positive(self, "batch_size", "cpu_threads")

    def to_dict(self) -> dict:
        """Without the younger fields that are not set, so that the digest of an older spec stays."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _LATER_CLIP_FIELDS or value is not None}

    @staticmethod
    def from_dict(values: dict) -> "ClipSpec":
        """Of a manifest or plan. Before the activation was recorded a tag ran whatever its architecture's name says,
        which is not always what its weights need: such features must not be mixed with right ones. Raises NotKnown for
        one of a later release.
        """
        known_fields(ClipSpec, values, "CLIP")
        spec = ClipSpec(**values)
        if "activation" not in values and spec.revision.startswith(TAG_REVISION):
            architecture = spec.model.partition("/")[0]
            ran = "quick_gelu" if architecture.endswith(QUICK_GELU_SUFFIX) else "gelu"
            return dataclasses.replace(spec, activation=ran)
        return spec

    def identity(self) -> dict:
        """For a checkpoint's config.json: what is needed to load the same CLIP again and to see that it is the same."""
        names = ("model", "revision", "dtype", *_OF_WEIGHTS)
        return {name: value for name, value in self.to_dict().items() if name in names}

    @property
    def architecture(self) -> str:
        """What the NAME of a tag or a checkpoint file says besides the weights; "" of a folder or a hub repo."""
        return self.model.partition("/")[0] if self.activation else ""

    def conflicts(self, other: "ClipSpec") -> list[str]:
        """What proves that `other` makes other features, as "activation: gelu -> quick_gelu". A name proves nothing:
        a model may move. What one of the two did not record is not compared.
        """
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _OF_WEIGHTS}
        return [f"{name}: {one} -> {two}" for name, (one, two) in pairs.items() if one and two and one != two]


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
        return dataclasses.asdict(self) | {"generator": self.generator.to_dict(), "clip": self.clip.to_dict()}

    @staticmethod
    def from_dict(values: dict) -> "DatasetSpec":
        """Raises NotKnown for one of a later release, which has fields or rules that this one lacks."""
        known_fields(DatasetSpec, values, "spec")
        known_fields(GeneratorSpec, values["generator"], "generator")
        if (version := values.get("generator_version", GENERATOR_VERSION)) > GENERATOR_VERSION:
            raise NotKnown(f"generator version {version}: not known to this release, which has {GENERATOR_VERSION}")
        rest = {key: value for key, value in values.items() if key not in ("generator", "clip")}
        return DatasetSpec(
            generator=GeneratorSpec(**values["generator"]), clip=ClipSpec.from_dict(values["clip"]), **rest
        )

    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: "DatasetSpec") -> list[str]:
        """Fields in which `other` differs, as "generator.guidance_scale: 7.5 -> 2.0".

        A younger field that this spec, the recorded one, does not have is not compared; neither is the revision of a
        CLIP of which only the tag was recorded, nor the digest of weights that a commit tells as well.
        """
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        for name in LATER_FIELDS:  # left out means the default
            mine[f"generator.{name}"] = getattr(self.generator, name)
            theirs[f"generator.{name}"] = getattr(other.generator, name)
        if self.generator_version > 1:
            one, two = self.generator.without_places(), other.generator.without_places()
            for name in ("model", "vae", "config", "loras"):  # where a folder lies does not matter
                mine[f"generator.{name}"], theirs[f"generator.{name}"] = getattr(one, name), getattr(two, name)
        one_clip, two_clip = [(clip.revision, clip.architecture) for clip in (self.clip, other.clip)]
        if one_clip == two_clip and self.clip.revision.startswith(DIGEST):
            del mine["clip.model"]  # likewise
        if self.clip.revision.startswith(TAG_REVISION) and self.clip.model == other.clip.model:
            del mine["clip.revision"]
        if self.clip.revision == other.clip.revision and other.clip.weights is None:  # not known without the hub
            mine.pop("clip.weights", None)
        return [f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}" for key in mine if mine.get(key) != theirs.get(key)]

    def at_places_of(self, other: "DatasetSpec") -> "DatasetSpec":
        """The same, its models where those of `other` lie, which has no `differences`: for loading, never for
        recording."""
        places = other.generator
        generator = dataclasses.replace(
            self.generator, model=places.model, vae=places.vae, config=places.config, loras=places.loras
        )
        return dataclasses.replace(
            self, generator=generator, clip=dataclasses.replace(self.clip, model=other.clip.model)
        )


#: Fields of a GeneratorSpec younger than the first datasets: at their default they enter neither digest nor seeds.
LATER_FIELDS = (
    "pipeline_options", "loras", "vae", "vae_revision", "variant", "without", "config", "config_revision", "offload",
)  # fmt: skip
#: Fields of a ClipSpec younger than the first datasets: at their default they are left out of the digest of the spec.
_LATER_CLIP_FIELDS = ("activation", "weights", "compile")
#: Of these, what says which CLIP it is.
_OF_WEIGHTS = ("activation", "weights")


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
