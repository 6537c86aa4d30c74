"""How much memory a text-to-image model takes, told from the headers of its files before a weight is read."""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pcm.errors import InputError, first_line
from pcm.generation.names import model_source
from pcm.generation.pipeline_index import PipelineIndex, UnreachableIndex, read_index
from pcm.spec import GeneratorSpec

log = logging.getLogger(__name__)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: The allowance for what is computed: so many of the decoder's largest maps (its second-narrowest channels, at the
#: picture's size) for each picture that is decoded at once, and what a process on a GPU takes before it does anything.
LIVE_MAPS = 4
CONTEXT = 500_000_000
#: Where the configurations do not say: Stable Diffusion's decoder, and pixels a side.
CHANNELS, SIDE = 256, 1024
#: Pixels a side that a tile of --vae-tiling has at most.
TILE = 512
#: No header of a safetensors file is longer.
LARGEST_HEADER = 100_000_000
#: Weights as they are named without a variant, whole or in parts.
_PLAIN = re.compile(r"[\w-]+\.safetensors")


@dataclass(frozen=True)
class ModelMemory:
    """Weights of each part, and what one picture takes beside them."""

    weights: Mapping[str, int]  # of each part
    decoder_map: int  # numbers in the decoder's largest map of one picture

    def bytes(self, dtype: str, *, pictures: int = 1, offload: str = "none") -> int:
        """With `offload` the largest part alone is on the GPU, or next to nothing of it (sequential)."""
        kept = {"none": sum(self.weights.values()), "model": max(self.weights.values()), "sequential": 0}[offload]
        return BYTES[dtype] * (kept + LIVE_MAPS * self.decoder_map * pictures) + CONTEXT

    def describe(self, dtype: str, *, pictures: int, offload: str = "none") -> str:
        total = sum(self.weights.values())
        parts = ", ".join(f"{part} {count / 1e9:.2f}" for part, count in self.weights.items())
        whole = self.bytes(dtype, pictures=pictures, offload=offload)
        return (
            f"{total / 1e9:.2f} billion weights ({parts}), about {gigabytes(whole)} as {dtype} with {pictures} "
            f"pictures at once"
        )


def model_memory(spec: GeneratorSpec) -> ModelMemory | None:
    """Of a spec's model; None where its files are not here and their headers cannot be had. Raises InputError."""
    source = Path(model_source(spec.model))
    if source.is_file():
        counts = _parts_of_file(source)
        return ModelMemory(counts, _decoder_map(read_index(spec.config, spec.config_revision), spec))  # type: ignore[arg-type]
    try:
        index = read_index(spec.model, spec.revision)
    except UnreachableIndex:
        return None  # who loads it says what is wrong
    wanted = [part for part in index.components if part not in spec.without]
    try:
        names, count = _files_of(index)
        weights = {part: sum(map(count, loaded_files(part, names, spec.variant))) for part in wanted}
    except (OSError, ValueError) as error:
        log.warning("%s: how much memory it takes is not known (%s)", spec.model, first_line(error))
        return None
    weights = {part: numbers for part, numbers in weights.items() if numbers}
    return ModelMemory(weights, _decoder_map(index, spec)) if weights else None


def refuse_too_large(spec: GeneratorSpec, available: int, where: str) -> None:
    """Raises InputError where the model and one picture of it take more than the bytes that `where` has."""
    if (memory := model_memory(spec)) is None:
        return
    needed = memory.bytes(spec.dtype, offload=spec.offload)
    if needed <= available:
        return
    ways = [] if spec.dtype != "float32" else ["--dtype bfloat16"]
    if spec.device == "cuda":
        ways += {"none": ["--offload model"], "model": ["--offload sequential"]}.get(spec.offload, [])
        ways.append("a GPU with more memory: one model over several GPUs is not supported")
    else:
        ways.append("a machine with more memory")
    raise InputError(
        f"text-to-image model {spec.model!r}: takes about {gigabytes(needed)} as {spec.dtype} with one picture, and "
        f"{where} has {gigabytes(available)}; give {', or '.join(ways)}"
    )


def available_here(device: str) -> tuple[int, str]:
    """(bytes that this process may use, of what). What others hold now counts as theirs on a GPU alone."""
    if device == "cuda":
        import torch

        _, total = torch.cuda.mem_get_info()
        share = torch.cuda.get_per_process_memory_fraction()
        return int(share * total), f"this process's share of the {torch.cuda.get_device_name()}"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _decoder_map(index: PipelineIndex, spec: GeneratorSpec) -> int:
    decoder = index.config("vae") or index.config("movq")
    blocks = decoder.get("block_out_channels") or [CHANNELS]
    denoiser = index.config("unet") or index.config("transformer")
    side, scale = denoiser.get("sample_size"), 2 ** (len(blocks) - 1)
    own = side * scale if isinstance(side, int) and decoder else SIDE
    width, height = spec.width or own, spec.height or own
    if spec.vae_tiling:
        width, height = min(width, TILE), min(height, TILE)
    return blocks[1 if len(blocks) > 1 else 0] * width * height


def _files_of(index: PipelineIndex) -> tuple[list[str], Callable[[str], int]]:
    """(names of all files, how many numbers the weights in one of them are)."""
    source = Path(model_source(index.model))
    if source.is_dir():
        files = [file.relative_to(source).as_posix() for file in source.rglob("*.safetensors")]
        return files, lambda name: sum(_counts(source / name).values())
    from httpx2 import HTTPError  # of the hub's client: no connection
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()

    def count(name: str) -> int:
        found = hub.parse_safetensors_file_metadata(index.model, name, revision=index.revision)
        return sum(found.parameter_count.values())

    try:
        return list(hub.list_repo_files(index.model, revision=index.revision)), count
    except (HfHubHTTPError, HTTPError) as error:
        raise OSError(first_line(error)) from None


def loaded_files(part: str, names: Iterable[str], variant: str | None) -> list[str]:
    """The part's files that are loaded: the variant's where it has some, else those without one."""
    inside = [name for name in names if name.startswith(f"{part}/") and name.endswith(".safetensors")]
    plain = [name for name in inside if _PLAIN.fullmatch(name.partition("/")[2])]
    special = [name for name in inside if variant and re.search(rf"\.{re.escape(variant)}[.-]", name)]
    return special or plain


def _parts_of_file(file: Path) -> dict[str, int]:
    """Of a single file: by the first word of a name. The moving average of a training is not loaded."""
    parts: dict[str, int] = {}
    for name, numbers in _counts(file).items():
        part = name.partition(".")[0]
        if part != "model_ema":
            parts[part] = parts.get(part, 0) + numbers
    return parts


def _counts(file: Path) -> dict[str, int]:
    """Numbers in each tensor of a safetensors file, from its header. Raises OSError and ValueError."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"{file.name}: no safetensors file")
        header = json.loads(stream.read(size))
    return {name: math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
