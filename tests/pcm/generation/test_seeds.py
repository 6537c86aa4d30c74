"""The seed of a picture: what enters it and what does not; every other field of the spec is shown as a difference."""

import dataclasses
import json

import pytest

from pcm.generation.seeds import SPEED_FIELDS, attempt_seed, sample_seed, sample_seeds
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec

GENERATOR = GeneratorSpec(model="org/repo", revision="0" * 40)
CLIP = ClipSpec(model="ViT-L-14/openai", revision="open_clip:openai")
SPEC = DatasetSpec(generator=GENERATOR, clip=CLIP)

OTHER_GENERATORS = {
    "model": "other", "revision": "1" * 40, "num_inference_steps": 49, "guidance_scale": 7.0, "width": 512,
    "height": 512, "scheduler": "DDIMScheduler", "negative_prompt": "blurry", "prompt_template": "a photo of {caption}",
    "dtype": "float16", "device": "cuda", "batch_size": 4, "cpu_threads": 2, "max_attempts": 5, "image_format": "png",
    "image_quality": 90, "scheduler_options": (("timestep_spacing", "trailing"),),
    "pipeline_options": (("clip_skip", 1),), "loras": (("org/lora", "2" * 40, 0.5),), "vae": "org/vae",
    "vae_revision": "3" * 40, "variant": "fp16", "without": ("text_encoder_3",), "config": "org/config",
    "config_revision": "4" * 40,
}  # fmt: skip
OTHER_SPEEDS = {
    "attention": "sdpa", "channels_last": True, "compile": "default", "vae_slicing": True, "vae_tiling": True,
    "prompt_cache": True, "offload": "model",
}  # fmt: skip


def test_seed_is_the_same_today_and_in_every_later_release() -> None:
    folder = dataclasses.replace(SPEC, generator=GeneratorSpec(model="folder", revision="sha256:0"))
    assert sample_seed(dataclasses.replace(folder, generator_version=1), "123", 0) == 5971948036524844
    real = GeneratorSpec(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        num_inference_steps=20, guidance_scale=2.0, width=512, height=512, scheduler="DPMSolverMultistepScheduler",
        negative_prompt="blurry", dtype="bfloat16", device="cuda", batch_size=16,
    )  # fmt: skip
    spec = dataclasses.replace(SPEC, generator=real, seed=5, images_per_caption=2)
    assert [sample_seed(spec, "000000007", image) for image in (0, 1)] == [5990707286725671, 2931147543498867]


def local(place: str, **generator: object) -> DatasetSpec:
    """Everything that can be a folder or a file, at a place; its bytes stay the same."""
    values: dict = {
        "model": f"{place}/model", "revision": "sha256:0", "vae": f"{place}/vae", "vae_revision": "sha256:1",
        "loras": ((f"{place}/lora.safetensors", "sha256:2", 1.0),), "config": f"{place}/config",
        "config_revision": "sha256:3",
    }  # fmt: skip
    return dataclasses.replace(SPEC, generator=GeneratorSpec(**values | generator))


def test_where_a_folder_lies_enters_no_seed_since_version_two() -> None:
    assert sample_seed(local("/here"), "1", 0) == sample_seed(local("/there"), "1", 0)
    assert local("/here").differences(local("/there")) == [], "the digests are compared"
    for other in ({"revision": "sha256:9"}, {"vae_revision": "sha256:9"}, {"config_revision": "sha256:9"}):
        assert sample_seed(local("/here", **other), "1", 0) != sample_seed(local("/here"), "1", 0)
        assert local("/here").differences(local("/here", **other))
    before = [dataclasses.replace(local(place), generator_version=1) for place in ("/here", "/there")]
    assert sample_seed(before[0], "1", 0) != sample_seed(before[1], "1", 0)


def test_an_unused_younger_field_leaves_the_digest_of_a_spec() -> None:
    values = SPEC.to_dict()
    assert "loras" not in values["generator"] and "offload" not in values["generator"]
    for spec in (SPEC, local("/here")):
        assert DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).generator == spec.generator


def test_seed_differs_by_caption_id_picture_and_base_seed() -> None:
    seeds = {sample_seed(SPEC, corpus_id, image) for corpus_id in ("1", "11", "2") for image in range(3)}
    seeds |= {sample_seed(dataclasses.replace(SPEC, seed=1), "1", image) for image in range(3)}
    assert len(seeds) == 12


def test_seed_is_exact_as_a_json_number() -> None:
    seeds = [sample_seed(SPEC, str(index), 0) for index in range(1000)]
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert max(seeds) > 2**52, "the whole range is used"


def test_seed_does_not_depend_on_what_does_not_draw() -> None:
    other = dataclasses.replace(SPEC, clip=dataclasses.replace(CLIP, batch_size=7), images_per_caption=4)
    assert sample_seed(other, "1", 0) == sample_seed(SPEC, "1", 0)


def test_every_generator_field_is_tried_below() -> None:
    assert {*OTHER_GENERATORS, *OTHER_SPEEDS} == {field.name for field in dataclasses.fields(GeneratorSpec)}
    assert set(OTHER_SPEEDS) == set(SPEED_FIELDS)


@pytest.mark.parametrize("name", OTHER_GENERATORS)
def test_every_generator_field_changes_seed_and_digest_and_is_shown_as_a_difference(name: str) -> None:
    value = OTHER_GENERATORS[name]
    other = dataclasses.replace(SPEC, generator=dataclasses.replace(GENERATOR, **{name: value}))
    assert sample_seed(other, "1", 0) != sample_seed(SPEC, "1", 0)
    assert other.digest() != SPEC.digest()
    assert SPEC.differences(other) == [f"generator.{name}: {getattr(GENERATOR, name)!r} -> {value!r}"]


@pytest.mark.parametrize("name", OTHER_SPEEDS)
def test_a_speed_option_leaves_the_seed_and_is_shown_as_a_difference(name: str) -> None:
    value = OTHER_SPEEDS[name]
    other = dataclasses.replace(SPEC, generator=dataclasses.replace(GENERATOR, **{name: value}))
    assert sample_seed(other, "1", 0) == sample_seed(SPEC, "1", 0)
    assert other.digest() != SPEC.digest()
    assert SPEC.differences(other) == [f"generator.{name}: {getattr(GENERATOR, name)!r} -> {value!r}"]


def test_a_spec_that_was_stored_gives_the_same_seeds() -> None:
    options = dataclasses.replace(GENERATOR, scheduler_options={"use_karras_sigmas": True, "beta_start": 0.001})
    for spec in (SPEC, dataclasses.replace(SPEC, generator=options)):
        again = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert sample_seed(again, "1", 0) == sample_seed(spec, "1", 0)


def test_many_seeds_are_those_of_one_at_a_time() -> None:
    spec = dataclasses.replace(SPEC, images_per_caption=3)
    corpus_ids = ["1", "name.jpg#0", 'a "b" \\', "犬"]
    one_by_one = [sample_seed(spec, corpus_id, image) for corpus_id in corpus_ids for image in range(3)]
    assert sample_seeds(spec, corpus_ids) == one_by_one and len(set(one_by_one)) == 12


def test_attempts_go_on_from_the_first_seed() -> None:
    assert [attempt_seed(2**53 - 1, attempt) for attempt in range(3)] == [2**53 - 1, 2**53, 2**53 + 1]
