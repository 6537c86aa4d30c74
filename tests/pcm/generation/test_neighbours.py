"""A picture depends on no neighbour, whatever the pipeline does with prompts of other lengths."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import peft

from pcm.errors import InputError
from pcm.generation.batch_search import try_generator
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Request
from pcm.generation.neighbour_test import LONG, PROMPT, find_dependence
from pcm.generation.pipeline_loading import load_pipeline
from pcm.spec import GeneratorSpec
from tests.helpers.tiny_pipelines import save_pipeline
from tests.pcm.generation.test_diffusers_pipeline import spec_of

PROMPTS = ("a cat", "a very long caption " * 20, "rain", "two red buses on a street", "a dog")
REQUESTS = [Request(position=index, caption=prompt, seed=50 + index) for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="session")
def cogview4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It pads prompts to the longest of the batch and masks nothing."""
    return save_pipeline("cogview4", tmp_path_factory.mktemp("pipelines") / "cogview4")


@pytest.fixture(scope="session")
def lumina2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("lumina2", tmp_path_factory.mktemp("pipelines") / "lumina2")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


def small(folder: Path, **values: object) -> GeneratorSpec:
    return spec_of(folder, **({"width": 64, "height": 64, "guidance_scale": 5.0} | values))


def test_a_pipeline_that_pads_to_the_longest_prompt_draws_one_at_a_time_and_says_so(
    cogview4: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        generator = DiffusersTextToImage(small(cogview4))
    assert "depends on what is drawn beside it" in caplog.text and "s a picture of 2 steps" in caplog.text
    drawn = generator.draw(REQUESTS)
    assert {drawing.batch_size for drawing in drawn} == {1}, "each row says so, and --only draws it so"
    assert generator.draw(REQUESTS[::-1]) == drawn[::-1]
    as_recorded = DiffusersTextToImage(small(cogview4, batch_size=1))
    assert not as_recorded.one_at_a_time, "a batch of one has no neighbours"
    assert as_recorded.draw(REQUESTS[:2]) == drawn[:2]


def test_an_automatic_batch_size_tries_no_other_where_neighbours_matter(cogview4: Path) -> None:
    assert [trial.size for trial in try_generator(DiffusersTextToImage(small(cogview4)))] == [1]


def test_compiling_is_refused_where_prompts_have_no_fixed_length(cogview4: Path) -> None:
    with pytest.raises(InputError, match=r"--compile: the prompts of .* have no fixed length"):
        load_pipeline(small(cogview4, compile="default"))


def test_a_pipeline_of_fixed_length_keeps_its_batch_size(
    tiny_t2i: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizing = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(tokenizing, "handlers", [caplog.handler])
    generator = DiffusersTextToImage(spec_of(tiny_t2i))
    assert "sequence length is longer" not in caplog.text and not tokenizing.disabled, "of the test's own prompt"
    assert not generator.one_at_a_time
    assert {drawing.batch_size for drawing in generator.draw(REQUESTS)} == {4}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_test_notices_a_neighbour_of_any_batch_size(batch_size: int) -> None:
    def draw(prompts: list[str], seeds: range, leak: float) -> np.ndarray:
        longest = max(len(prompt) for prompt in prompts)
        return np.stack(
            [
                np.full((4, 6, 3), seed + len(prompt) + leak * longest)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )

    assert find_dependence(lambda prompts, seeds: draw(prompts, seeds, 0.0), batch_size).independent
    leaking = find_dependence(lambda prompts, seeds: draw(prompts, seeds, 1e-9), batch_size)
    assert leaking.independent == (batch_size == 1), "a difference far below a byte counts"
    assert leaking.size == (6, 4)
    assert len(LONG) > 77 * 3 > len(PROMPT)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8])
def test_the_test_notices_what_the_first_pictures_seed_decides_for_all(batch_size: int) -> None:
    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return np.stack([np.full((4, 6, 3), float(seed + 1000 * seeds[0])) for seed in seeds])

    assert not find_dependence(draw, batch_size).independent


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_that_no_seed_decides_is_refused(batch_size: int, sd3: Path) -> None:
    """Stable Diffusion 3 hands its scheduler no generator."""
    for values in (
        {"scheduler": "FlowMatchLCMScheduler"},
        {"scheduler_options": {"stochastic_sampling": True}},
    ):
        with pytest.raises(InputError, match=r"FlowMatch\w+ draws noise that no seed decides") as caught:
            DiffusersTextToImage(small(sd3, batch_size=batch_size, **values))
        assert "\n" not in str(caught.value)


def test_a_batch_is_drawn_twice_only_where_it_may_have_drawn_noise_of_its_own() -> None:
    calls: list[list[str]] = []

    def draw(prompts: list[str], seeds: range, noise: bool) -> np.ndarray:
        calls.append(prompts)
        return np.zeros((1, 4, 6, 3)) + float(torch.rand(1) if noise else 0.0)

    assert find_dependence(lambda prompts, seeds: draw(prompts, seeds, False), 1).same_twice
    assert len(calls) == 1
    assert not find_dependence(lambda prompts, seeds: draw(prompts, seeds, True), 1).same_twice


def test_a_size_that_the_pipeline_does_not_draw_is_refused_with_the_one_it_does(lumina2: Path) -> None:
    with pytest.raises(InputError, match=r"--width 128: .* draws pictures of 16x16 then"):
        DiffusersTextToImage(small(lumina2, width=128, height=128, batch_size=1))


def test_a_part_that_an_error_left_in_another_precision_is_put_back(tiny_t2i: Path) -> None:
    """Stable Diffusion XL decodes float16 in float32; out of memory on the way leaves the decoder so."""
    generator = DiffusersTextToImage(spec_of(tiny_t2i))
    vae = generator._pipeline.vae
    decode = vae.decode

    def upcast_and_fail(*args: object, **kwargs: object) -> None:
        vae.to(torch.float64)
        vae.decode = decode
        raise torch.OutOfMemoryError("out of memory")

    expected = DiffusersTextToImage(spec_of(tiny_t2i, batch_size=2)).draw(REQUESTS[:2])
    vae.decode = upcast_and_fail
    drawn = generator.draw(REQUESTS[:2])
    assert vae.dtype == torch.float32
    assert drawn == expected, "in batches of two after it"


def test_a_pipeline_that_cannot_draw_is_refused_before_any_caption_is_blamed(tiny_t2i: Path) -> None:
    with pytest.raises(InputError, match="cannot draw a test picture"):
        DiffusersTextToImage(spec_of(tiny_t2i, pipeline_options={"clip_skip": 99}))


def test_weights_of_five_dimensions_have_no_channels_last(tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcm.generation import pipeline_loading

    pipeline = load_pipeline(spec_of(tiny_t2i))
    pipeline.vae.decoder.conv_out = torch.nn.Conv3d(4, 4, 1)
    with pytest.raises(InputError, match=r"--channels-last: the AutoencoderKL of .* has weights of 5 dimensions"):
        pipeline_loading.prepare_pipeline(pipeline, spec_of(tiny_t2i, channels_last=True))


def test_out_of_memory_on_the_way_to_the_device_is_one_line(tiny_t2i: Path) -> None:
    from pcm.generation.pipeline_loading import prepare_pipeline

    pipeline = load_pipeline(spec_of(tiny_t2i))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    pipeline.to = fail
    with pytest.raises(InputError, match=r"does not fit into the memory of cpu as float32 .*--offload model") as caught:
        prepare_pipeline(pipeline, spec_of(tiny_t2i))
    assert "\n" not in str(caught.value)


def test_a_lora_is_fused_with_its_weight(tiny_t2i: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(spec_of(tiny_t2i))
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipeline.unet))
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="lora.safetensors")
    name = str(tmp_path / "lora.safetensors")

    def drawn(*weights: float) -> bytes:
        loras = tuple((name, "sha256:0", weight) for weight in weights)
        return DiffusersTextToImage(spec_of(tiny_t2i, loras=loras)).draw(REQUESTS[:1])[0].image

    assert drawn() == drawn(0.0) != drawn(1.0)
    fused = load_pipeline(spec_of(tiny_t2i, loras=((name, "sha256:0", 1.0),)))
    assert not any("lora" in part for part, _ in fused.unet.named_parameters()), "no layer of its own is left"
