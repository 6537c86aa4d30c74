"""The spec decides every pixel: what a resume compares, what is refused at once."""

import dataclasses
import json

import pytest

from pcm.errors import InputError, NotKnown
from pcm.generation.seeds import SPEED_FIELDS
from pcm.spec import LATER_FIELDS, ClipSpec, DatasetSpec, GeneratorSpec

GENERATOR = GeneratorSpec(model="folder", revision="sha256:0")
CLIP = ClipSpec(model="ViT-L-14/openai", revision="open_clip:openai", activation="quick_gelu")
SPEC = DatasetSpec(generator=GENERATOR, clip=CLIP)


def test_a_spec_equals_itself_after_json() -> None:
    options = dataclasses.replace(GENERATOR, scheduler_options={"use_karras_sigmas": True, "beta_start": 0.001})
    for spec in (SPEC, dataclasses.replace(SPEC, generator=options)):
        again = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec and again.digest() == spec.digest() and not spec.differences(again)


def test_scheduler_options_do_not_depend_on_the_order_in_which_they_are_given() -> None:
    one, two = ({"a": 1, "b": "x"}, {"b": "x", "a": 1})
    specs = [dataclasses.replace(GENERATOR, scheduler_options=options) for options in (one, two)]
    assert specs[0] == specs[1] and hash(specs[0]) == hash(specs[1])


def test_a_spec_stored_before_an_option_existed_has_its_default() -> None:
    stored = SPEC.to_dict()
    for name in {*SPEED_FIELDS, "scheduler_options"} - set(LATER_FIELDS):  # those are not stored at their default
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


def moved(spec: DatasetSpec, clip: str) -> DatasetSpec:
    return dataclasses.replace(spec, clip=dataclasses.replace(spec.clip, model=clip))


def test_where_a_folder_or_a_file_lies_is_no_difference() -> None:
    generator = dataclasses.replace(
        GENERATOR, vae="/a/vae", vae_revision="sha256:1", loras=(("/a/lora", "sha256:2", 0.5),)
    )
    clip = ClipSpec(model="/a/clip", revision="sha256:3")
    spec = DatasetSpec(generator=generator, clip=clip)
    places = dataclasses.replace(generator, model="s3://b/t2i", vae="/b/vae", loras=(("/b/lora", "sha256:2", 0.5),))
    now = DatasetSpec(generator=places, clip=dataclasses.replace(clip, model="s3://b/clip"))
    assert not spec.differences(now) and spec.at_places_of(now) == now
    other = moved(dataclasses.replace(spec, clip=dataclasses.replace(clip, revision="sha256:4")), "/b/clip")
    assert spec.differences(other) == [
        "clip.model: '/a/clip' -> '/b/clip'",
        "clip.revision: 'sha256:3' -> 'sha256:4'",
    ]


def test_a_checkpoint_file_may_move_and_keeps_its_architecture() -> None:
    clip = ClipSpec(model="ViT-B-32//a/own.pt", revision="sha256:3", activation="gelu")
    spec = DatasetSpec(generator=GENERATOR, clip=clip)
    assert not spec.differences(moved(spec, "ViT-B-32//b/own.pt"))
    assert spec.differences(moved(spec, "ViT-B-16//b/own.pt")) == [
        "clip.model: 'ViT-B-32//a/own.pt' -> 'ViT-B-16//b/own.pt'"
    ]


def test_a_repo_or_a_tag_is_its_name() -> None:
    repo = dataclasses.replace(SPEC, clip=ClipSpec(model="hf-hub:org/one", revision="a" * 40))
    for spec, name in ((SPEC, "ViT-B-32/openai"), (repo, "hf-hub:org/two")):
        assert spec.differences(moved(spec, name)) == [f"clip.model: {spec.clip.model!r} -> {name!r}"]


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ({"generator_version": 3}, "generator version 3: not known to this release, which has 2"),
        ({"refiner": None}, "spec field 'refiner': not known to this release"),
        ({"generator": GENERATOR.to_dict() | {"refiner": None}}, "generator field 'refiner': not known"),
        ({"clip": CLIP.to_dict() | {"crop": 1}}, "CLIP field 'crop': not known to this release"),
    ],
)
def test_a_spec_of_a_later_release_is_not_drawn_by_the_rules_of_this_one(later: dict, said: str) -> None:
    with pytest.raises(NotKnown, match=said):
        DatasetSpec.from_dict(SPEC.to_dict() | later)
    assert DatasetSpec.from_dict(SPEC.to_dict() | {"generator_version": 1}).generator_version == 1
