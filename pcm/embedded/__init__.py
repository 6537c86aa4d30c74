"""The embedded pack: a small text-to-image pipeline, a small CLIP and test pictures of one small drawn world.

Everything is in standard formats: `t2i/` loads with `DiffusionPipeline.from_pretrained`, `clip/` with open_clip's
`local-dir:` schema, the test sets with `datasets.load_dataset("parquet", ...)`.
"""

from pathlib import Path

from pcm.errors import InputError

PACK = Path(__file__).parent / "pack"
SPLITS = ("val", "test", "val@second", "test@second")
#: With which its text-to-image pipeline is run unless told otherwise, and with which it was judged.
STEPS = 8
GUIDANCE_SCALE = 3.0
CORPORA = {"embedded": "captions.txt", "embedded-second": "captions_second.txt"}


def caption_file(name: str) -> str:
    """The path of an embedded corpus that is given by its name; any other path or URI unchanged."""
    return str(corpus_path(name)) if name in CORPORA else name


def t2i_path() -> Path:
    """The diffusers folder of the text-to-image pipeline (64 x 64 pictures)."""
    return _part("t2i")


def clip_path() -> Path:
    """The open_clip folder: open_clip_config.json, open_clip_model.safetensors and the tokenizer's files."""
    return _part("clip")


def corpus_path(name: str = "embedded") -> Path:
    """A text-only training corpus, one caption a line: "embedded" or, of the second domain, "embedded-second"."""
    if name not in CORPORA:
        raise InputError(f"unknown embedded corpus {name!r}: expected one of {', '.join(CORPORA)}")
    return _part(CORPORA[name])


def test_set_path(split: str) -> Path:
    """The Parquet file of held-out pictures with five references each; `split` is "val" or "test", those of the second
    domain "val@second" or "test@second"."""
    if split not in SPLITS:
        raise InputError(f"unknown embedded test set {split!r}: expected one of {', '.join(SPLITS)}")
    return _part(test_set_file(split))


def test_set_file(split: str) -> str:
    """The name of a test set's file in the pack."""
    return f"photos_{split.replace('@', '_')}.parquet"


def _part(name: str) -> Path:
    path = PACK / name
    if not path.exists():
        raise InputError(
            f"the embedded pack has no {name}: it belongs at {path}; reinstall, or run jobs.pretrain_embedded"
        )
    return path
