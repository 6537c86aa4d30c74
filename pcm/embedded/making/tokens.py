"""A small CLIP tokenizer (byte-level BPE) whose merges make every word of the world one token."""

import random
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pcm.embedded.making.captions import corpus
from pcm.embedded.making.world import DOMAINS, NOUNS

CONTEXT_LENGTH = 24  # start and end included: 22 words
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
PROMPTS = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a good photo of {}",
    "a photo of the {}",
    "a photo of a {}",
    "a photo of one {}",
    "a photo of many {}",
    "a drawing of a {}",
    "a small photo of a {}",
    "a large photo of a {}",
    "there is a {} in the scene",
    "this is a photo of {}",
)
MORE_WORDS = "close up clean dark bright cropped nice my it some with person man woman three four large small"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, that join every word (plain ASCII) into one token.

    Ties go to the first pair in alphabetical order: `tokenizers`' own trainer breaks them at random.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


@cache
def _words() -> list[str]:
    """Every word of the world's captions and of the prompts, in alphabetical order."""
    texts = [caption for domain in DOMAINS.values() for caption in corpus(random.Random(7), 20_000, domain)]
    texts += [f"{noun.name} {noun.plural}" for noun in NOUNS]
    words = {word for text in texts for word in text.split()}
    return sorted(words | {word for prompt in PROMPTS for word in prompt.format("").split()} | set(MORE_WORDS.split()))


def build_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and the tokenizer's other files into `folder`; the same bytes every time."""
    import pcm.torchvision_shim  # noqa: F401  isort: skip  - before transformers, which imports torchvision
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = learn_merges(_words())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" sorts first: id 0 pads, as in Stable Diffusion 2
    pieces = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(merge) for merge in merges)]
    pieces = [*dict.fromkeys(pieces), START, END]  # the end token has the highest id: CLIP pools there
    clip_tokenizer: Any = CLIPTokenizer  # its annotation of `merges` is narrower than what it takes
    tokenizer = clip_tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
