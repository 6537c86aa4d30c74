"""A picture is a pure function of caption, spec and seed; one that shows nothing is drawn again, then refused."""

import dataclasses
import gc
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers

from pcm.errors import InputError
from pcm.generation.blank_pictures import CONSTANT_STD
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Drawing, Request
from pcm.generation.loading import load_generator
from pcm.generation.null_generator import NullTextToImage
from pcm.images import open_image
from pcm.spec import GeneratorSpec
from tests.helpers.tiny_models import save_tiny_t2i

CAPTIONS = ["a cat", "a dog", "two cows", "a red bus", "rain", "a very long caption " * 20]
REQUESTS = [Request(position=index, caption=caption, seed=100 + index) for index, caption in enumerate(CAPTIONS)]


def spec_of(folder: Path, **values: object) -> GeneratorSpec:
    defaults = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4, "image_format": "png"}
    return GeneratorSpec(model=str(folder), revision="test", **(defaults | values))


@pytest.fixture(scope="module")
def generator(tiny_t2i: Path) -> DiffusersTextToImage:
    return DiffusersTextToImage(spec_of(tiny_t2i))


def test_the_weights_go_with_their_generator(tiny_t2i: Path) -> None:
    """At once, and not when Python next looks for cycles: an idle process does not, nor one that loads a model."""
    generator = DiffusersTextToImage(spec_of(tiny_t2i))
    generator.draw(REQUESTS[:1])
    unet = weakref.ref(generator._pipeline.unet)
    gc.disable()
    try:
        del generator
        assert unet() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def drawn(generator: DiffusersTextToImage) -> list[Drawing]:
    return generator.draw(REQUESTS)


def save_with_decoder(source: Path, target: Path, *, scale: float, bias: float) -> Path:
    """The same pipeline, its decoder's last layer scaled and shifted: what overflows and collapses look like."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight *= scale
        pipeline.vae.decoder.conv_out.bias.fill_(bias)
    pipeline.save_pretrained(target)
    return target


def test_pictures_are_pictures_of_the_models_size(drawn: list[Drawing]) -> None:
    for drawing in drawn:
        assert open_image(drawing.image).size == (drawing.width, drawing.height) == (32, 32)
        assert (drawing.reason, drawing.attempts) == ("", 1)
    assert [drawing.seed for drawing in drawn] == [request.seed for request in REQUESTS]
    assert len({drawing.image for drawing in drawn}) == len(drawn)


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(
    generator: DiffusersTextToImage, drawn: list[Drawing]
) -> None:
    assert {drawing.batch_size for drawing in drawn} == {4}, "they are not drawn alone"
    assert generator.draw(REQUESTS[::-1]) == drawn[::-1], "another order"
    assert generator.draw([REQUESTS[5], REQUESTS[1]]) == [drawn[5], drawn[1]], "the same slot in two batches"
    for request, drawing in zip(REQUESTS[:2], drawn[:2], strict=True):
        assert generator.draw([request]) == [drawing], "alone"


def test_a_picture_is_the_same_from_another_process_wide_random_state(
    generator: DiffusersTextToImage, drawn: list[Drawing]
) -> None:
    torch.manual_seed(999)
    torch.rand(17)
    assert generator.draw(REQUESTS[:1]) == drawn[:1]


def test_seed_and_caption_both_matter(generator: DiffusersTextToImage, drawn: list[Drawing]) -> None:
    first = REQUESTS[0]
    other_seed, other_caption = generator.draw(
        [dataclasses.replace(first, seed=7), dataclasses.replace(first, caption="a horse")]
    )
    assert len({drawn[0].image, other_seed.image, other_caption.image}) == 3


@pytest.mark.parametrize(
    ("scale", "bias", "reason"),
    [(1.0, float("nan"), "nan_image"), (0.0, 0.0, "constant_image"), (0.0, -3.0, "black_image")],
)
def test_a_picture_that_shows_nothing_is_tried_again_and_then_refused(
    scale: float, bias: float, reason: str, tiny_t2i: Path, tmp_path: Path
) -> None:
    folder = save_with_decoder(tiny_t2i, tmp_path / "t2i", scale=scale, bias=bias)
    drawings = DiffusersTextToImage(spec_of(folder, max_attempts=2)).draw(REQUESTS[:2])
    for drawing, request in zip(drawings, REQUESTS[:2], strict=True):
        assert (drawing.image, drawing.reason, drawing.attempts) == (b"", reason, 2)
        assert drawing.seed == request.seed + 1


@pytest.fixture(scope="module")
def borderline(tiny_t2i: Path, drawn: list[Drawing], tmp_path_factory: pytest.TempPathFactory) -> DiffusersTextToImage:
    """A pipeline about half of whose pictures are too flat, depending on the seed."""
    spreads = [np.asarray(open_image(drawing.image)).astype(float).std() / 255 for drawing in drawn]
    folder = tmp_path_factory.mktemp("borderline") / "t2i"
    save_with_decoder(tiny_t2i, folder, scale=CONSTANT_STD / float(np.median(spreads)), bias=0.0)
    return DiffusersTextToImage(spec_of(folder, max_attempts=4))


def test_a_refused_picture_is_drawn_again_with_the_next_seed(borderline: DiffusersTextToImage) -> None:
    requests = [Request(position=index, caption="a cat", seed=1000 * index) for index in range(12)]
    drawings = borderline.draw(requests)
    attempts = [drawing.attempts for drawing in drawings]
    assert 1 in attempts and max(attempts) > 1, "the model must be borderline for this test to say anything"
    for drawing, request in zip(drawings, requests, strict=True):
        assert drawing.seed == request.seed + drawing.attempts - 1
    retried = next(index for index, drawing in enumerate(drawings) if drawing.attempts > 1 and not drawing.reason)
    directly = borderline.draw([dataclasses.replace(requests[retried], seed=drawings[retried].seed)])[0]
    assert directly == dataclasses.replace(drawings[retried], attempts=1)


def save_with_safety_checker(source: Path, target: Path, *, threshold: float) -> Path:
    """The same pipeline with a real safety checker; it flags what has a cosine over the threshold with a concept."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8}, text_config={**tower, "vocab_size": 8},
        projection_dim=16,
    )  # fmt: skip
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn(17, 16))
        checker.special_care_embeds.copy_(torch.randn(3, 16))
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(2.0)  # a cosine is never above it
    side = {"height": 32, "width": 32}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        source, safety_checker=checker, requires_safety_checker=True,
        feature_extractor=transformers.CLIPImageProcessor(size=side, crop_size=side),
    )  # fmt: skip
    pipeline.save_pretrained(target)
    return target


def test_a_picture_that_the_safety_checker_blanks_is_quarantined_with_the_seeds_tried(
    tiny_t2i: Path, drawn: list[Drawing], tmp_path: Path
) -> None:
    harmless = save_with_safety_checker(tiny_t2i, tmp_path / "harmless", threshold=2.0)
    assert DiffusersTextToImage(spec_of(harmless)).draw(REQUESTS) == drawn
    strict = save_with_safety_checker(tiny_t2i, tmp_path / "strict", threshold=-2.0)
    drawings = DiffusersTextToImage(spec_of(strict, max_attempts=2)).draw(REQUESTS[:3])
    for drawing, request in zip(drawings, REQUESTS[:3], strict=True):
        assert (drawing.image, drawing.reason, drawing.attempts) == (b"", "nsfw_flagged", 2)
        assert drawing.seed == request.seed + 1


def test_size_and_negative_prompt_reach_the_pipeline(tiny_t2i: Path, drawn: list[Drawing]) -> None:
    wide = DiffusersTextToImage(spec_of(tiny_t2i, width=48, height=32)).draw(REQUESTS[:1])[0]
    assert open_image(wide.image).size == (wide.width, wide.height) == (48, 32)
    negative = DiffusersTextToImage(spec_of(tiny_t2i, negative_prompt="blurry")).draw(REQUESTS[:1])
    assert negative[0].image != drawn[0].image


def test_a_scheduler_is_a_class_of_diffusers(tiny_t2i: Path, drawn: list[Drawing]) -> None:
    ddpm = DiffusersTextToImage(spec_of(tiny_t2i, scheduler="DDPMScheduler"))
    assert ddpm.draw(REQUESTS[:1])[0].image != drawn[0].image
    for name in ("NoScheduler", "UNet2DConditionModel", "logging"):
        with pytest.raises(InputError, match=f"scheduler '{name}'"):
            DiffusersTextToImage(spec_of(tiny_t2i, scheduler=name))


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(InputError) as caught:
            load_generator(spec_of(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_tiny_pipeline_is_the_same_wherever_it_is_made(tiny_t2i: Path, tmp_path: Path) -> None:
    again = save_tiny_t2i(tmp_path / "t2i")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (tiny_t2i / name).read_bytes()


def test_the_null_generator_draws_one_pixel_whose_colour_is_twelve_bits_of_the_seed() -> None:
    spec = GeneratorSpec(model="null", revision="", image_format="png")
    generator = load_generator(spec)
    assert isinstance(generator, NullTextToImage)
    drawing = generator.draw([Request(position=0, caption="", seed=0xABC321)])[0]
    assert np.asarray(open_image(drawing.image)).tolist() == [[[17, 34, 51]]]
