"""A small CLIP tokenizer (byte-level BPE) whose merges make every word of the world one token."""

import json
import random
from pathlib import Path

from pcm.embedded.captions import corpus

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
MORE_WORDS = "close up clean dark bright cropped nice my it some with person man woman three four large small".split()


def build_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and the tokenizer's other files into `folder`; the same bytes every time."""
    import pcm.torchvision_shim  # noqa: F401  - transformers imports torchvision
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = {word for caption in corpus(random.Random(7), 20_000) for word in caption.split()}
    words |= {word for prompt in PROMPTS for word in prompt.format("").split()} | set(MORE_WORDS)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([[word] for word in sorted(words)], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" sorts first: id 0 pads, as in Stable Diffusion 2
    pieces = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(merge) for merge in merges)]
    pieces = [*dict.fromkeys(pieces), START, END]  # the end token has the highest id: CLIP pools there
    tokenizer = CLIPTokenizer(
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
