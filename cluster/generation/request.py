"""What a user asks of generation: `GenerateRequest`, and the options that jobs.stream shares with it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.dataset.request import ShardOptions
from cluster.generation.limits import FaultPolicy, PilotSize, RunLimits
from cluster.generation.presets import GENERATION_PRESETS
from cluster.options import Request, check_at_least, option, parse_count, parse_label, refuse_others, refuse_without
from pcm import embedded
from pcm.errors import InputError
from pcm.images import IMAGE_FORMATS
from pcm.name_value import read_value, split_name_value
from pcm.spec import ATTENTIONS, COMPILE_MODES, DEVICES, DTYPES, OFFLOADS, ClipSpec, DatasetSpec, GeneratorSpec
from pcm.text.csv_records import QUOTINGS
from pcm.text.detect import FORMATS

AUTO = "auto"
#: --retry-quarantined: whatever failed through the generator.
ALL_GENERATOR = "all-generator"


def parse_batch_size(text: str) -> int | str:
    """8 of "8", or "auto". Raises InputError."""
    if text == AUTO:
        return text
    if not text.isdecimal():
        raise InputError("write a number of pictures, or auto")
    return int(text)


def parse_scheduler_option(text: str) -> tuple[str, str | int | float | bool]:
    """("use_karras_sigmas", True) of "use_karras_sigmas=true". Raises InputError."""
    name, value = split_name_value(text, option="--scheduler-option", example="timestep_spacing=trailing")
    parsed = read_value(value)
    return name, parsed if isinstance(parsed, (int, float, bool)) else value


def parse_pipeline_option(text: str) -> tuple[str, str | int | float | bool]:
    """("clip_skip", 2) of "clip_skip=2". Raises InputError."""
    name, value = split_name_value(text, option="--pipeline-option", example="true_cfg_scale=4")
    parsed = read_value(value)
    return name, parsed if isinstance(parsed, (int, float, bool)) else value


def parse_lora(text: str) -> tuple[str, float]:
    """("org/repo", 0.8) of "org/repo=0.8", weight 1 of a name alone. Raises InputError."""
    name, equals, written = text.rpartition("=")
    if not equals:
        return text, 1.0
    weight = read_value(written)
    if not name or isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise InputError("write REPO_OR_FILE, or REPO_OR_FILE=WEIGHT such as latent-consistency/lcm-lora-sdv1-5=1")
    return name, float(weight)


def parse_node_label(text: str) -> tuple[str, str]:
    """("pcmnet.io/role", "generation") of "pcmnet.io/role=generation". Raises InputError."""
    return parse_label(text, option="--node-label", form="KEY=VALUE", example="pcmnet.io/role=generation")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Request):
    """Corpus."""

    corpus: str | None = option(
        None,
        help="captions: path or URI, or the embedded pack's: " + ", ".join(embedded.CORPORA),
        unset="the preset's; required without one",
    )
    corpus_format: str = option(
        AUTO, choices=(AUTO, *FORMATS), help="format of the captions; auto detects it from name and content"
    )
    caption_column: str | None = option(
        None,
        metavar="NAME[,NAME...]",
        help="columns that hold captions, of CSV, JSONL or Parquet; numbers from 1 for a CSV file without a header",
        unset="the first of caption, text, ...",
    )
    csv_quoting: str = option(
        QUOTINGS[0], choices=QUOTINGS, help="whether quotes round a CSV field belong to it; auto decides by evidence"
    )
    split: str = option("train", help="split of a Karpathy file (train takes restval too), or all")
    limit: int | None = option(None, help="only the first N records", unset="all")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Request):
    """Pictures (all recorded in the manifest)."""

    t2i: str | None = option(
        None,
        metavar="NAME",
        help="diffusers repo id, folder, URI of staged weights, single .safetensors file, 'embedded' or 'null'",
        unset="embedded",
    )
    t2i_revision: str | None = option(
        None, metavar="COMMIT", help="commit of the repo; a branch is resolved to its commit", unset="the newest"
    )
    t2i_variant: str | None = option(
        None, metavar="NAME", help="variant of the weight files: fp16 for *.fp16.safetensors", unset="the plain files"
    )
    t2i_without: tuple[str, ...] = option(
        (), metavar="PART", help="a part not to load: text_encoder_3 is Stable Diffusion 3's T5; safety_checker"
    )
    t2i_config: str | None = option(
        None,
        metavar="NAME",
        help="for a single file of weights: the repo (or ORG/REPO@COMMIT) or folder that says what is in it",
        unset="told from its weights",
    )
    lora: tuple[tuple[str, float], ...] = option(
        (),
        metavar="REPO_OR_FILE[=WEIGHT]",
        parse=parse_lora,
        help="fused into the model, with weight 1 by default: a .safetensors file, ORG/REPO or ORG/REPO/FILE, at its "
        "newest commit or at that of ORG/REPO@COMMIT",
    )
    vae: str | None = option(
        None, metavar="NAME", help="another decoder: repo id (or ORG/REPO@COMMIT) or folder", unset="the model's own"
    )
    pipeline_options: Mapping[str, str | int | float | bool] = option(
        {},
        flag="pipeline-option",
        metavar="NAME=VALUE",
        parse=parse_pipeline_option,
        help="argument of the pipeline's call: true_cfg_scale=4, max_sequence_length=256, clip_skip=1, ...",
    )
    steps: int | None = option(
        None,
        help="denoising steps",
        unset=f"a few-step model's, else the pipeline's own: Stable Diffusion {GeneratorSpec.num_inference_steps}, "
        f"embedded {embedded.STEPS}",
    )
    guidance_scale: float | None = option(
        None,
        help="classifier-free guidance",
        unset=f"a few-step model's, else the pipeline's own: Stable Diffusion {GeneratorSpec.guidance_scale:g}, "
        f"embedded {embedded.GUIDANCE_SCALE:g}",
    )
    width: int | None = option(None, help="pixels", unset="the model's own")
    height: int | None = option(None, help="pixels", unset="the model's own")
    scheduler: str | None = option(None, metavar="CLASS", help="diffusers scheduler class", unset="the model's own")
    scheduler_options: Mapping[str, str | int | float | bool] = option(
        {},
        flag="scheduler-option",
        metavar="NAME=VALUE",
        parse=parse_scheduler_option,
        help="value of the scheduler's configuration: timestep_spacing=trailing, use_karras_sigmas=true, ...",
    )
    negative_prompt: str | None = option(None, metavar="TEXT", help="what a picture should not show")
    prompt_template: str = option(GeneratorSpec.prompt_template, metavar="TEXT", help="the prompt of a caption")
    images_per_caption: int = option(DatasetSpec.images_per_caption, help="pictures of each caption")
    seed: int = option(DatasetSpec.seed, help="seed of the pictures: their noise follows from it and the caption's id")
    max_attempts: int = option(GeneratorSpec.max_attempts, help="seeds tried before a bad picture is quarantined")
    image_format: str = option(GeneratorSpec.image_format, choices=IMAGE_FORMATS, help="file format of stored pictures")
    image_quality: int = option(GeneratorSpec.image_quality, metavar="Q", help="quality of JPEG and WebP, 1 to 100")


@dataclass(frozen=True, kw_only=True)
class ClipOptions(Request):
    """Scores and features."""

    clip: str | None = option(
        None,
        metavar="NAME",
        help="open_clip NAME, URI of staged weights, 'embedded' or 'null'",
        unset="embedded, or null with --t2i null",
    )
    clip_revision: str | None = option(None, metavar="COMMIT", help="commit of the CLIP's hub repo", unset="the newest")
    clip_batch_size: int = option(ClipSpec.batch_size, help="pictures that CLIP encodes at once")
    concepts: str | None = option(
        None, metavar="P",
        help="concepts of captioners: a published pickle or concepts.safetensors; the published runs, Flickr30k's too, "
        "read one of 446 COCO nouns", unset="the captions' own 400 most frequent nouns",
    )  # fmt: skip
    nouns: str = option(
        "lexicon", metavar="NAME", help="what finds the captions' nouns: lexicon, or an installed spaCy model by name"
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Request):
    """Device and speed (recorded too: another batch shape or kernel rounds differently). Few-step models need their
    scheduler: LCM-LoRA --scheduler LCMScheduler; Lightning and Hyper-SD --scheduler-option
    timestep_spacing=trailing. Their steps and guidance are known by their name."""

    device: str = option(AUTO, choices=DEVICES, help="auto is cuda where the cluster has a GPU")
    dtype: str = option(
        AUTO, choices=(AUTO, *DTYPES), help="auto is bfloat16 on GPUs, float32 on CPUs; float32 is never TensorFloat32"
    )
    batch_size: int | str = option(
        GeneratorSpec.batch_size, metavar="N|auto", parse=parse_batch_size,
        help="pictures drawn at once; auto measures first",
    )  # fmt: skip
    attention: str = option(GeneratorSpec.attention, choices=ATTENTIONS, help="default is torch's fused one")
    channels_last: bool = option(False, help="convolutions in NHWC")
    compile: str = option(
        GeneratorSpec.compile, choices=COMPILE_MODES, bare="default", help="torch.compile of denoiser, decoder and CLIP"
    )
    vae_slicing: bool = option(False, help="decode picture by picture: less memory")
    vae_tiling: bool = option(False, help="decode large pictures in tiles: less memory")
    prompt_cache: bool = option(False, help="encode each distinct prompt once, alone")
    offload: str = option(
        GeneratorSpec.offload,
        choices=OFFLOADS,
        help="keep the model in main memory and bring each part (sequential: each layer) to the GPU in turn",
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Request):
    """Shards."""

    shard_size: int | None = option(
        None,
        help="samples a shard: the unit of work and of commit",
        unset=f"{ShardOptions.shard_size}, or as many as are drawn in ten minutes, measured once, if these are fewer",
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Request):
    """Machine."""

    generators: int | tuple[int, int] | None = option(
        None, metavar="N|MIN:MAX", parse=parse_count,
        help="generator actors, or the least and most of a pool that grows", unset="one a GPU, or one a core",
    )  # fmt: skip
    scorers: int | None = option(
        None, help="actors of CLIP alone", unset="none: a generator scores what it has drawn, on its own GPU"
    )
    clip_gpus: int = option(
        0, help="GPUs of each actor of CLIP alone, one for 16 generators unless --scorers says how many"
    )
    node_label: tuple[str, str] | None = option(
        None, metavar="KEY=VALUE", parse=parse_node_label, help="run only on nodes with this Ray label", unset="any"
    )

    @property
    def node_labels(self) -> dict[str, str]:
        """What the nodes have on which the actors are."""
        return dict([self.node_label]) if self.node_label else {}


@dataclass(frozen=True, kw_only=True)
class WatchOptions(Request):
    """Watching and cost. Cost = price x GPUs that the run reserves (one a generator, from the moment it is there) x
    hours, start-up included; drawing on CPUs, price x machines of the cluster x hours. Storage and traffic are not in
    it."""

    price_per_hour: float | None = option(
        RunLimits.price_per_hour, help="price of one GPU, or of one machine on CPUs", unset="no cost is given"
    )
    spot: bool = option(RunLimits.spot, help="the price is of spot capacity: a label in the summary")
    stop_below_clip_score: float | None = option(
        RunLimits.stop_below_clip_score, 
        help="stop once at least 64 pictures have a mean clip score (raw cosine) two standard errors below X",
        unset="never",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FaultOptions(Request):
    """Faults."""

    batch_timeout: float = option(
        FaultPolicy.batch_timeout,
        metavar="S",
        help="seconds a batch may take; four times that where --compile compiles it",
    )
    max_error_share: float = option(
        FaultPolicy.max_error_share, 
        help="stop once more than this share of at least 64 samples has failed in the generator",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(
    FaultOptions,
    WatchOptions,
    MachineOptions,
    PlanOptions,
    SpeedOptions,
    ClipOptions,
    PictureOptions,
    CorpusOptions,
):
    """What says how a whole dataset is made. Raises InputError for what cannot be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "limit steps images_per_caption max_attempts clip_batch_size scorers shard_size"
        check_at_least(self, 1, *counts.split())
        if isinstance(self.batch_size, int):
            check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "clip_gpus")
        if self.image_format == "png" and self.image_quality != GeneratorSpec.image_quality:
            raise InputError(f"--image-quality {self.image_quality}: without effect on PNG; leave it out")
        if self.clip_revision is not None and self.clip in (None, "embedded", "null"):
            raise InputError(f"--clip-revision {self.clip_revision}: is for a CLIP of the hub; leave it out")
        if self.offload != "none" and self.device == "cpu":
            raise InputError(f"--offload {self.offload}: is for GPUs, and this draws on the CPU; leave it out")
        refuse_without(self, "price_per_hour", "spot")
        if self.concepts is not None and self.nouns != "lexicon":
            raise InputError(f"--nouns {self.nouns}: without effect beside --concepts, which are given; leave it out")
        self.faults, self.limits  # noqa: B018  # check themselves

    @property
    def faults(self) -> FaultPolicy:
        return FaultPolicy(batch_timeout=self.batch_timeout, max_error_share=self.max_error_share)

    @property
    def limits(self) -> RunLimits:
        return RunLimits(
            price_per_hour=self.price_per_hour, spot=self.spot, stop_below_clip_score=self.stop_below_clip_score
        )


#: What of a dataset may lie elsewhere now.
_OF_DRAWING = ("t2i", "t2i_config", "vae", "lora")
#: What --retry-quarantined listens to; the rest stands in the dataset.
_OF_RETRY = ("out", "clip", *_OF_DRAWING, *MachineOptions.__annotations__, *FaultOptions.__annotations__)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(GenerationOptions):
    """A dataset to make, or with `only` or `retry_quarantined` what to do to the one at `out`; paths or URIs.

    Raises InputError for values that cannot be, and for options that have no effect together.
    """

    out: str = option(writes="folder", help="dataset: path or URI")
    preset: str | None = option(
        None,
        choices=tuple(GENERATION_PRESETS),
        metavar="NAME",
        help=f"{', '.join(GENERATION_PRESETS)}: its values for what is not given (cluster/generation/presets.py)",
    )
    spec: str | None = option(
        None,
        metavar="DATASET.JSON",
        help="take every setting of another dataset from its dataset.json: pictures, CLIP, concepts, shards, device, "
        "speed, and how the same corpus is read; what is given beside it wins",
    )
    only: str | None = option(None, metavar="SAMPLE_ID", help="regenerate one sample of --out alone and compare")
    image_out: str | None = option(
        None, metavar="FILE", writes="file", help="with --only: write the regenerated picture here, a local file"
    )
    pilot: str | None = option(
        None,
        metavar="1%|N",
        help="make only so many samples, in evenly spaced shards that the full run skips, at least one a generator; "
        "predict images/s, hours, bytes and cost of the whole",
    )
    retry_quarantined: str | None = option(
        None,
        metavar="REASON",
        help=f"try the samples of --out that were quarantined for REASON again; {ALL_GENERATOR}: whatever failed "
        "through the generator",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_without(self, "only", "image_out")
        if self.image_out and "://" in self.image_out:
            raise InputError(f"--image-out {self.image_out}: must be a local file, such as picture.png")
        if self.image_out and not os.path.isdir(os.path.dirname(self.image_out) or "."):
            raise InputError(f"--image-out {self.image_out}: its folder is not there; make it first")
        if self.only is not None:
            refuse_others(
                self, "only", ("out", "image_out", *_OF_DRAWING), why="which takes everything from the dataset"
            )
        elif self.retry_quarantined is not None:
            refuse_others(self, "retry_quarantined", _OF_RETRY, why="which takes the rest from the dataset")
        elif self.corpus is None and self.preset is None:
            raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")
        if self.spec is not None and self.preset is not None:
            raise InputError("--spec, --preset: give one of the two")
        if self.pilot is not None:
            PilotSize.parse(self.pilot)
