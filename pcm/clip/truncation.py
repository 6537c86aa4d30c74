"""How many tokens a text has for a CLIP, and whether they are too many; the tokenizer is made where it is needed."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pcm.clip.names import resolve_clip_name


def truncation_check(name: str) -> Callable[[str], bool]:
    """Whether a prompt has more tokens than the CLIP's context, without loading the model's weights.

    The text encoder of the text-to-image model is a CLIP of the same context in every Stable Diffusion.
    """
    if name == "null":
        return lambda text: False
    architecture, _ = resolve_clip_name(name)

    @cache
    def tokenizer() -> tuple[Any, int]:
        """The tokenizer and its context length: with the first prompt, because a plan that stands needs neither."""
        from pcm.clip.configuration import open_tokenizer  # seconds to import

        made = open_tokenizer(architecture)
        return made, made.context_length or 77

    def is_truncated(text: str) -> bool:
        made, context_length = tokenizer()
        # A token is at least one byte of UTF-8, so short prompts need no tokenising.
        return len(text.encode()) + 2 > context_length and count_tokens(made, text) > context_length

    return is_truncated


def count_tokens(tokenizer: Any, text: str) -> int:
    """CLIP tokens of `text` by one of open_clip's tokenizers, start and end included."""
    if hasattr(tokenizer, "tokenizer"):  # a Hugging Face tokenizer inside open_clip's wrapper
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text), truncation=False)["input_ids"])
    return len(tokenizer.encode(text)) + 2  # start and end
