"""The spec decides every pixel: what enters the seed, what a resume compares, what is refused at once."""

import dataclasses
import json

import pytest

from pcm.errors import InputError
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec

GENERATOR = GeneratorSpec(model="folder", revision="sha256:0")
CLIP = ClipSpec(model="ViT-L-14/openai", revision="open_clip:openai")
SPEC = DatasetSpec(generator=GENERATOR, clip=CLIP)

OTHER_GENERATORS = {
    "model": "other", "revision": "sha256:1", "num_inference_steps": 49, "guidance_scale": 7.0, "width": 512,
    "height": 512, "scheduler": "DDIMScheduler", "negative_prompt": "blurry", "prompt_template": "a photo of {caption}",
    "dtype": "float16", "device": "cuda", "batch_size": 4, "cpu_threads": 2, "max_attempts": 5, "image_format": "png",
    "image_quality": 90,
}  # fmt: skip


def test_seed_is_the_same_today_and_in_every_later_release() -> None:
    assert SPEC.sample_seed("123", 0) == 5971948036524844


def test_seed_differs_by_caption_id_picture_and_base_seed() -> None:
    seeds = {SPEC.sample_seed(corpus_id, image) for corpus_id in ("1", "11", "2") for image in range(3)}
    seeds |= {dataclasses.replace(SPEC, seed=1).sample_seed("1", image) for image in range(3)}
    assert len(seeds) == 12


def test_seed_is_exact_as_a_json_number() -> None:
    seeds = [SPEC.sample_seed(str(index), 0) for index in range(1000)]
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert max(seeds) > 2**52, "the whole range is used"


def test_seed_does_not_depend_on_what_does_not_draw() -> None:
    other = dataclasses.replace(SPEC, clip=dataclasses.replace(CLIP, batch_size=7), images_per_caption=4)
    assert other.sample_seed("1", 0) == SPEC.sample_seed("1", 0)


def test_every_generator_field_is_tried_below() -> None:
    assert set(OTHER_GENERATORS) == {field.name for field in dataclasses.fields(GeneratorSpec)}


@pytest.mark.parametrize("name", OTHER_GENERATORS)
def test_every_generator_field_changes_seed_and_digest_and_is_shown_as_a_difference(name: str) -> None:
    value = OTHER_GENERATORS[name]
    other = dataclasses.replace(SPEC, generator=dataclasses.replace(GENERATOR, **{name: value}))
    assert other.sample_seed("1", 0) != SPEC.sample_seed("1", 0)
    assert other.digest() != SPEC.digest()
    assert SPEC.differences(other) == [f"generator.{name}: {getattr(GENERATOR, name)!r} -> {value!r}"]


def test_a_spec_equals_itself_after_json() -> None:
    again = DatasetSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC and again.digest() == SPEC.digest() and not SPEC.differences(again)


def test_braces_in_a_caption_are_text_and_no_template() -> None:
    spec = dataclasses.replace(GENERATOR, prompt_template="a photo of {caption}, sharp")
    assert spec.prompt("a {caption} {0} sign") == "a photo of a {caption} {0} sign, sharp"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dtype": "float8"}, "dtype 'float8': allowed are float32, bfloat16, float16"),
        ({"image_format": "bmp"}, "image format 'bmp': allowed are jpeg, png, webp"),
        ({"image_quality": 0}, "image quality 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0: must be at least 1"),
        ({"batch_size": -1}, "batch_size -1"),
        ({"max_attempts": 0}, "max_attempts 0"),
        ({"width": 100}, "width 100: must be a positive multiple of 8"),
        ({"height": -8}, "height -8"),
        ({"prompt_template": "a photo"}, "must contain {caption}"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(values: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(GENERATOR, **values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_pictures_a_caption_is_refused() -> None:
    with pytest.raises(InputError, match="images_per_caption 0"):
        dataclasses.replace(SPEC, images_per_caption=0)
