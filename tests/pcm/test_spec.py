"""The spec decides every pixel: what enters the seed, what a resume compares, what is refused at once."""

import dataclasses
import json

import pytest

from pcm.errors import InputError
from pcm.spec import SPEED_FIELDS, ClipSpec, DatasetSpec, GeneratorSpec

GENERATOR = GeneratorSpec(model="folder", revision="sha256:0")
CLIP = ClipSpec(model="ViT-L-14/openai", revision="open_clip:openai", activation="quick_gelu")
SPEC = DatasetSpec(generator=GENERATOR, clip=CLIP)

OTHER_GENERATORS = {
    "model": "other", "revision": "sha256:1", "num_inference_steps": 49, "guidance_scale": 7.0, "width": 512,
    "height": 512, "scheduler": "DDIMScheduler", "negative_prompt": "blurry", "prompt_template": "a photo of {caption}",
    "dtype": "float16", "device": "cuda", "batch_size": 4, "cpu_threads": 2, "max_attempts": 5, "image_format": "png",
    "image_quality": 90, "scheduler_options": (("timestep_spacing", "trailing"),),
}  # fmt: skip
OTHER_SPEEDS = {
    "attention": "sdpa", "channels_last": True, "compile": "default", "vae_slicing": True, "vae_tiling": True,
    "prompt_cache": True,
}  # fmt: skip


def test_seed_is_the_same_today_and_in_every_later_release() -> None:
    assert SPEC.sample_seed("123", 0) == 5971948036524844
    real = GeneratorSpec(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        num_inference_steps=20, guidance_scale=2.0, width=512, height=512, scheduler="DPMSolverMultistepScheduler",
        negative_prompt="blurry", dtype="bfloat16", device="cuda", batch_size=16,
    )  # fmt: skip
    spec = dataclasses.replace(SPEC, generator=real, seed=5, images_per_caption=2)
    assert [spec.sample_seed("000000007", image) for image in (0, 1)] == [5990707286725671, 2931147543498867]


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
    assert {*OTHER_GENERATORS, *OTHER_SPEEDS} == {field.name for field in dataclasses.fields(GeneratorSpec)}
    assert set(OTHER_SPEEDS) == set(SPEED_FIELDS)


@pytest.mark.parametrize("name", OTHER_GENERATORS)
def test_every_generator_field_changes_seed_and_digest_and_is_shown_as_a_difference(name: str) -> None:
    value = OTHER_GENERATORS[name]
    other = dataclasses.replace(SPEC, generator=dataclasses.replace(GENERATOR, **{name: value}))
    assert other.sample_seed("1", 0) != SPEC.sample_seed("1", 0)
    assert other.digest() != SPEC.digest()
    assert SPEC.differences(other) == [f"generator.{name}: {getattr(GENERATOR, name)!r} -> {value!r}"]


@pytest.mark.parametrize("name", OTHER_SPEEDS)
def test_a_speed_option_leaves_the_seed_and_is_shown_as_a_difference(name: str) -> None:
    value = OTHER_SPEEDS[name]
    other = dataclasses.replace(SPEC, generator=dataclasses.replace(GENERATOR, **{name: value}))
    assert other.sample_seed("1", 0) == SPEC.sample_seed("1", 0)
    assert other.digest() != SPEC.digest()
    assert SPEC.differences(other) == [f"generator.{name}: {getattr(GENERATOR, name)!r} -> {value!r}"]


def test_a_spec_equals_itself_after_json() -> None:
    options = dataclasses.replace(GENERATOR, scheduler_options={"use_karras_sigmas": True, "beta_start": 0.001})
    for spec in (SPEC, dataclasses.replace(SPEC, generator=options)):
        again = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec and again.digest() == spec.digest() and not spec.differences(again)
        assert again.sample_seed("1", 0) == spec.sample_seed("1", 0)


def test_scheduler_options_do_not_depend_on_the_order_in_which_they_are_given() -> None:
    one, two = ({"a": 1, "b": "x"}, {"b": "x", "a": 1})
    specs = [dataclasses.replace(GENERATOR, scheduler_options=options) for options in (one, two)]
    assert specs[0] == specs[1] and hash(specs[0]) == hash(specs[1])


def test_a_spec_stored_before_an_option_existed_has_its_default() -> None:
    stored = SPEC.to_dict()
    for name in (*SPEED_FIELDS, "scheduler_options"):
        del stored["generator"][name]
    assert DatasetSpec.from_dict(stored) == SPEC


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
        ({"attention": "xformers"}, "attention 'xformers': allowed are default, sdpa, eager"),
        ({"compile": "max-autotune"}, "compile 'max-autotune': allowed are none, default, reduce-overhead"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(values: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(GENERATOR, **values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_pictures_a_caption_is_refused() -> None:
    with pytest.raises(InputError, match="images_per_caption 0"):
        dataclasses.replace(SPEC, images_per_caption=0)


def test_features_of_a_tag_from_before_its_activation_was_recorded_are_not_mixed_with_right_ones() -> None:
    """Then a tag ran what its architecture's name says: GELU with OpenAI's weights, which need QuickGELU."""
    older = SPEC.to_dict() | {"clip": {name: value for name, value in CLIP.to_dict().items() if name != "activation"}}
    recorded = DatasetSpec.from_dict(older)
    assert recorded.differences(SPEC) == ["clip.activation: 'gelu' -> 'quick_gelu'"]
    assert recorded.clip.conflicts(CLIP) == ["activation: gelu -> quick_gelu"]
    older["clip"]["model"] = "ViT-L-14-quickgelu/openai"
    assert not DatasetSpec.from_dict(older).clip.conflicts(CLIP)


def test_an_older_spec_without_activation_keeps_its_digest_and_can_be_resumed() -> None:
    """Of folders and of null, whose digest was the sha256 of the same JSON before there was the field."""
    spec = dataclasses.replace(SPEC, clip=ClipSpec(model="folder", revision="sha256:0"))
    assert "activation" not in spec.to_dict()["clip"]
    assert DatasetSpec.from_dict(spec.to_dict()) == spec
    known = dataclasses.replace(spec, clip=dataclasses.replace(spec.clip, activation="gelu"))
    assert not spec.differences(known), "what was not recorded is not compared"
