"""Whether a prompt is longer than the drawing model reads, by its own tokenizers and without its weights."""

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from pcm.clip.truncation import truncation_check as cut_by_clip
from pcm.errors import InputError, first_line
from pcm.generation.names import UNDRAWN, model_source
from pcm.generation.pipeline_index import PipelineIndex, UnreachableIndex, read_index
from pcm.spec import DatasetSpec, GeneratorSpec

log = logging.getLogger(__name__)

#: A tokenizer without a length of its own says 10**30.
LONGEST = 10**6


def truncation_check(dataset: DatasetSpec) -> Callable[[str], bool]:
    """Whether every text encoder of the spec's pipeline cuts a prompt. (Version 1: its CLIP.)

    Of several encoders the one that reads most counts: Flux's CLIP reads 77 tokens, and its T5 the whole prompt.
    The tokenizers are loaded with the first prompt that may be too long. The null generator cuts nothing.
    """
    if dataset.generator_version == 1:
        return cut_by_clip(dataset.clip.model)
    spec = dataset.generator
    if spec.model == "null" or spec.model in UNDRAWN:
        return lambda text: False

    @cache
    def tokenizers() -> list[tuple[Any, int]]:
        source, revision = (spec.config, spec.config_revision) if spec.config else (spec.model, spec.revision)
        try:
            index = read_index(source, revision)
        except UnreachableIndex as error:
            log.warning("%s; whether prompts are too long is judged by CLIP's tokenizer", error)
            cut = cut_by_clip(dataset.clip.model)
            return [(lambda text: {"input_ids": (0,) * cut(text)}, 0)]
        try:
            return _load(index, spec)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"text-to-image model {spec.model!r}: its tokenizer: {first_line(error)}") from None

    def is_truncated(text: str) -> bool:
        # A token is at least one byte of UTF-8, and no model reads fewer than 77: short prompts need no tokenizing.
        return len(text.encode()) + 2 > 77 and all(len(each(text)["input_ids"]) > most for each, most in tokenizers())

    return is_truncated


def _load(index: PipelineIndex, spec: GeneratorSpec) -> list[tuple[Any, int]]:
    """(tokenizer, tokens that are read) of every tokenizer; empty tokenizers cut nothing."""
    import pcm.torchvision_shim  # noqa: F401  isort: skip
    import transformers

    source = model_source(index.model)
    where = {"local_files_only": True} if Path(source).is_dir() else {"revision": index.revision}
    longest = _longest_sequence(index, spec)
    found: list[tuple[Any, int]] = []
    for part, (library, kind) in index.components.items():
        if part.startswith("tokenizer") and library == "transformers" and part not in spec.without:
            tokenizer = getattr(transformers, kind).from_pretrained(source, subfolder=part, **where)
            own = tokenizer.model_max_length
            if longest is not None and kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
                own = min(own, longest) if own < LONGEST else longest
            found.append((partial(tokenizer, verbose=False), own))  # else it says itself that a prompt is too long
    return found or [(lambda text: {"input_ids": ()}, LONGEST)]


def _longest_sequence(index: PipelineIndex, spec: GeneratorSpec) -> int | None:
    from pcm.generation.pipeline_signature import read_signature

    options = dict(spec.pipeline_options)
    default = read_signature(index.model, index.revision).defaults.get("max_sequence_length")
    value = options.get("max_sequence_length", default)
    return value if isinstance(value, int) else None
