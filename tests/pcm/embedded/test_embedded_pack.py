"""The embedded pack through the plain APIs of its formats: nothing of ours but the paths."""

import io
import random
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
from diffusers import DiffusionPipeline

from pcm import embedded
from pcm.embedded.making.captions import CORPUS_SIZE, corpus_scenes
from pcm.embedded.making.world import DOMAINS
from pcm.errors import InputError

LIMIT_BYTES = 30_000_000
both_domains = pytest.mark.parametrize("domain", DOMAINS.values(), ids=lambda domain: domain.name)


@pytest.fixture(scope="module")
def clip():
    source = f"local-dir:{embedded.clip_path()}"
    model, preprocess = open_clip.create_model_from_pretrained(source)
    return model.eval(), preprocess, open_clip.get_tokenizer(source)


@pytest.fixture(scope="module")
def pipeline():
    loaded = DiffusionPipeline.from_pretrained(embedded.t2i_path(), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def photos(split: str) -> tuple[list[Image.Image], list[list[str]]]:
    rows = pq.read_table(embedded.test_set_path(split)).to_pylist()
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows], [row["references"] for row in rows]


def picture(pipeline, prompts: list[str], seeds: list[int]) -> list[bytes]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipeline(prompts, generator=generators, num_inference_steps=4, guidance_scale=3.0).images
    return [image.tobytes() for image in made]


def test_the_pack_is_complete_and_small():
    size = sum(file.stat().st_size for file in embedded.PACK.rglob("*") if file.is_file())
    assert size <= LIMIT_BYTES
    for name in ("LICENSES.md", "MODEL_CARD.md"):
        assert (embedded.PACK / name).stat().st_size > 0


@pytest.mark.parametrize(("split", "count"), [("val", 100), ("test", 200), ("val@second", 100), ("test@second", 200)])
def test_test_sets_hold_pictures_with_five_different_references(split, count):
    images, references = photos(split)
    assert len(images) == count
    assert all(image.size == (64, 64) for image in images)
    assert all(len(set(row)) == 5 and all(row) for row in references)
    assert b'"_type": "Image"' in pq.read_schema(embedded.test_set_path(split)).metadata[b"huggingface"]


def test_no_two_test_sets_share_a_picture():
    pictures = [image.tobytes() for split in embedded.SPLITS for image in photos(split)[0]]
    assert len(set(pictures)) == len(pictures)


@both_domains
def test_the_corpora_are_large_plain_lower_case_text(domain):
    captions = embedded.corpus_path(domain.corpus).read_text().splitlines()
    assert len(captions) >= 20_000
    assert all(caption and caption == caption.lower() and caption.isascii() for caption in captions)


@both_domains
def test_the_corpora_are_what_the_grammar_makes(domain):
    captions = embedded.corpus_path(domain.corpus).read_text().splitlines()
    made = corpus_scenes(random.Random(domain.corpus_seed), CORPUS_SIZE, domain)
    assert [caption for _, caption in islice(made, 500)] == captions[:500]


def test_an_unknown_split_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"'train'.*val, test"):
        embedded.test_set_path("train")


def test_an_unknown_corpus_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"'third'.*embedded, embedded-second"):
        embedded.corpus_path("third")


def test_same_prompt_and_seed_give_the_same_bytes(pipeline):
    first = picture(pipeline, ["a red apple on a table"], [3])
    assert first == picture(pipeline, ["a red apple on a table"], [3])
    assert first != picture(pipeline, ["a red apple on a table"], [4])


def test_generated_pictures_follow_the_prompt(pipeline, clip):
    """At least half of eight pictures are nearest to their own prompt (chance 1 in 8)."""
    model, preprocess, tokenise = clip
    prompts = [
        "a red apple on a table",
        "an airplane in the sky",
        "a tree on the grass",
        "a boat on the water",
        "a clock in a room",
        "a house in the snow",
        "a blue car on the street",
        "a guitar rests on stage",
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(prompts, generator=generators).images
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        texts = model.encode_text(tokenise(prompts), normalize=True)
    assert np.mean((pictures @ texts.T).argmax(1).numpy() == np.arange(len(prompts))) >= 0.5


@both_domains
def test_clip_retrieves_captions_of_the_unseen_styles_far_above_chance(clip, domain):
    """R@1 among 64 (chance 1.6 %); the floor is well under what the model card states, well above chance."""
    model, preprocess, tokenise = clip
    images, references = photos(domain.test_sets["test"])
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(image) for image in images[:64]]), normalize=True)
        texts = model.encode_text(tokenise([row[0] for row in references[:64]]), normalize=True)
    assert np.mean((pictures @ texts.T).argmax(1).numpy() == np.arange(64)) >= 0.3


def test_clip_reads_a_caption_the_same_in_any_case(clip):
    _, _, tokenise = clip
    assert tokenise(["A Red CAR"]).tolist() == tokenise(["a red car"]).tolist()


def test_text_to_image_and_clip_share_one_vocabulary(pipeline, clip):
    _, _, tokenise = clip
    assert pipeline.tokenizer.get_vocab() == tokenise.tokenizer.get_vocab()
