"""Each way to make a pipeline fast does what its name says, and leaves a picture independent of its neighbours."""

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from pcm.errors import InputError
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.pipeline_call import call_pipeline
from pcm.generation.pipeline_loading import _load_parts, keep_outputs, load_pipeline, prepare_pipeline
from pcm.generation.seeds import SPEED_FIELDS
from pcm.images import open_image
from pcm.spec import GeneratorSpec
from tests.helpers.tiny_pipelines import save_pipeline
from tests.pcm.generation.test_diffusers_pipeline import REQUESTS, save_with_safety_checker, spec_of

#: Every option that a CPU can run, with the few-step schedulers that draw noise at every step.
OPTIONS = {
    "attention sdpa": {"attention": "sdpa"},
    "attention eager": {"attention": "eager"},
    "channels_last": {"channels_last": True},
    "vae_slicing": {"vae_slicing": True},
    "vae_tiling": {"vae_tiling": True, "width": 64, "height": 64},
    "prompt_cache": {"prompt_cache": True},
    "compile": {"compile": "default"},
    "LCM": {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0},
    "Turbo": {
        "scheduler": "EulerAncestralDiscreteScheduler", "scheduler_options": {"timestep_spacing": "trailing"},
        "num_inference_steps": 2, "guidance_scale": 0.0,
    },
}  # fmt: skip


def test_a_variant_that_a_repo_lacks_is_not_advised_again(tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(spec: GeneratorSpec) -> None:
        raise ValueError("You are trying to load the model files of the `variant=fp16`, but there are none.")

    monkeypatch.setattr("pcm.generation.pipeline_loading._load_parts", fails)
    with pytest.raises(InputError, match=r"if it has no files \*.fp16.safetensors, leave --t2i-variant out"):
        load_pipeline(spec_of(tiny_t2i, variant="fp16"))
    with pytest.raises(InputError, match="give --t2i-variant fp16"):
        load_pipeline(spec_of(tiny_t2i))


def test_a_release_of_diffusers_that_passes_over_the_dtype_is_told_of(
    tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_pipeline(spec_of(tiny_t2i, dtype="bfloat16")).unet.dtype == torch.bfloat16
    load = diffusers.DiffusionPipeline.from_pretrained

    def without_dtype(source: str, *, dtype: torch.dtype, **options: object) -> object:
        return load(source, **options)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", without_dtype)
    load_pipeline(spec_of(tiny_t2i))
    with pytest.raises(InputError, match=r"dtype bfloat16: diffusers \S+ has loaded \S+ as float32; install") as caught:
        load_pipeline(spec_of(tiny_t2i, dtype="bfloat16"))
    assert "\n" not in str(caught.value)


def test_every_speed_option_is_tried_below() -> None:
    needs_a_gpu = {"offload"}
    assert {name for values in OPTIONS.values() for name in values} >= set(SPEED_FIELDS) - needs_a_gpu


@pytest.mark.parametrize("name", OPTIONS)
def test_with_each_option_a_picture_does_not_depend_on_its_neighbours(name: str, tiny_t2i: Path) -> None:
    if name == "compile" and not os.environ.get("PCM_TEST_COMPILE"):
        pytest.skip("two minutes of compiling on a CPU; PCM_TEST_COMPILE=1 runs it (it needs g++)")
    generator = DiffusersTextToImage(spec_of(tiny_t2i, **OPTIONS[name]))
    drawn = generator.draw(REQUESTS)
    assert not any(drawing.reason for drawing in drawn)
    assert len({drawing.image for drawing in drawn}) == len(drawn)
    assert generator.draw(REQUESTS[::-1]) == drawn[::-1], "another order"
    assert generator.draw([REQUESTS[5], REQUESTS[1]]) == [drawn[5], drawn[1]], "the same slot in two batches"
    assert generator.draw(REQUESTS[2:3]) == drawn[2:3], "alone"


@pytest.mark.parametrize("name", ["attention sdpa", "attention eager", "channels_last", "vae_slicing", "prompt_cache"])
def test_an_option_for_speed_draws_the_same_picture_but_for_rounding(name: str, tiny_t2i: Path) -> None:
    plain = DiffusersTextToImage(spec_of(tiny_t2i)).draw(REQUESTS[:4])
    fast = DiffusersTextToImage(spec_of(tiny_t2i, **OPTIONS[name])).draw(REQUESTS[:4])
    for one, two in zip(plain, fast, strict=True):
        pixels = [torch.tensor(list(open_image(drawing.image).tobytes()), dtype=torch.float) for drawing in (one, two)]
        torch.testing.assert_close(*pixels, atol=1.0, rtol=0.0)


def loaded(folder: Path, **values: object) -> object:
    return load_pipeline(spec_of(folder, **values))


def offloaded(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> object:
    """The pipeline as on a GPU that it is brought to in parts; the CPU stands for the GPU."""
    pipeline = _load_parts(spec_of(folder))
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        bring = functools.partialmethod(getattr(diffusers.DiffusionPipeline, name), device="cpu")
        monkeypatch.setattr(diffusers.DiffusionPipeline, name, bring)
    return prepare_pipeline(pipeline, spec_of(folder, device="cuda", **values))


def test_attention_is_what_the_spec_says(tiny_t2i: Path) -> None:
    for attention, kind in (("sdpa", AttnProcessor2_0), ("eager", AttnProcessor)):
        processors = loaded(tiny_t2i, attention=attention).unet.attn_processors.values()
        assert processors and {type(processor) for processor in processors} == {kind}


def test_convolutions_of_denoiser_and_decoder_are_channels_last(tiny_t2i: Path) -> None:
    pipeline = loaded(tiny_t2i, channels_last=True)
    for module in (pipeline.unet, pipeline.vae):
        weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        assert any(not weight.is_contiguous() for weight in weights), "1x1 convolutions alone would be both"


def test_convolutions_of_a_model_that_waits_for_its_turn_are_channels_last(
    tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = offloaded(
        tiny_t2i, monkeypatch, offload="sequential", channels_last=True
    ).unet.conv_in._hf_hook.weights_map
    assert weights["weight"].is_contiguous(memory_format=torch.channels_last)
    assert not weights["weight"].is_contiguous()


def test_slicing_and_tiling_reach_the_decoder(tiny_t2i: Path) -> None:
    vae = loaded(tiny_t2i).vae
    assert (vae.use_slicing, vae.use_tiling) == (False, False)
    vae = loaded(tiny_t2i, vae_slicing=True, vae_tiling=True).vae
    assert (vae.use_slicing, vae.use_tiling) == (True, True)


def test_scheduler_options_reach_the_scheduler(tiny_t2i: Path) -> None:
    for scheduler in (None, "DPMSolverMultistepScheduler"):
        values = {"scheduler": scheduler, "scheduler_options": {"timestep_spacing": "trailing"}}
        config = loaded(tiny_t2i, **values).scheduler.config
        assert config.timestep_spacing == "trailing"
        assert config.num_train_timesteps == 100, "the rest stays the model's"


def test_a_scheduler_reaches_the_pipeline_that_draws_within_another(tmp_path: Path) -> None:
    pipeline = loaded(save_pipeline("kandinsky22", tmp_path / "t2i"), scheduler="EulerAncestralDiscreteScheduler")
    assert type(pipeline.decoder_pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert type(pipeline.prior_pipe.scheduler).__name__ == "UnCLIPScheduler"


def test_attention_with_keys_and_values_of_its_own_is_left_as_it_is(tmp_path: Path) -> None:
    folder = save_pipeline("kandinsky22", tmp_path / "t2i")
    for attention in ("sdpa", "eager"):
        with pytest.raises(InputError, match=f"attention '{attention}': this UNet2DConditionModel has default alone"):
            loaded(folder, attention=attention)


def test_a_scheduler_option_that_does_not_exist_is_refused(tiny_t2i: Path) -> None:
    with pytest.raises(InputError, match=r"LCMScheduler option 'karras': allowed are .*timestep_spacing"):
        loaded(tiny_t2i, scheduler="LCMScheduler", scheduler_options={"karras": True})


def test_a_value_or_steps_that_the_scheduler_cannot_do_are_refused_in_one_line(tiny_t2i: Path) -> None:
    for values, said in (
        ({"scheduler_options": {"beta_schedule": "cosine"}}, "DDIMScheduler with beta_schedule=cosine: cosine is not"),
        ({"scheduler": "LCMScheduler", "num_inference_steps": 60}, "--steps 60: LCMScheduler cannot do so"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            loaded(tiny_t2i, **values)
        assert "\n" not in str(caught.value)


def test_denoiser_and_decoder_are_compiled_and_a_tiled_decoder_is_not(tiny_t2i: Path) -> None:
    pipeline = loaded(tiny_t2i, compile="default")
    assert pipeline.unet._compiled_call_impl is not None
    assert pipeline.vae.decoder._compiled_call_impl is not None
    assert loaded(tiny_t2i, compile="default", vae_tiling=True).vae.decoder._compiled_call_impl is None
    assert torch._inductor.config.deterministic
    spec: GeneratorSpec = dataclasses.replace(spec_of(tiny_t2i), compile="none")
    assert load_pipeline(spec).unet._compiled_call_impl is None


def test_a_scheduler_that_looks_back_sees_earlier_outputs_though_all_are_written_to_one_place(tiny_t2i: Path) -> None:
    """A CUDA graph returns the same memory at every call; here a compiled module that does so stands for one."""
    # Without guidance: with it, the pipeline hands the scheduler a sum of its own.
    spec = spec_of(tiny_t2i, scheduler="PNDMScheduler", num_inference_steps=6, guidance_scale=1.0)
    plain = load_pipeline(spec)
    expected, _ = call_pipeline(plain, spec, ["a cat"], [1])
    drawn = {}
    for kept in (False, True):
        pipeline = load_pipeline(spec)
        unet = pipeline.unet
        place: list[torch.Tensor] = []

        def as_a_graph(*args: object, unet=unet, place=place, **kwargs: object) -> tuple[torch.Tensor]:
            (output,) = unet._call_impl(*args, **kwargs)
            if not place:
                place.append(torch.empty_like(output))
            return (place[0].copy_(output),)

        unet._compiled_call_impl = as_a_graph
        if kept:
            keep_outputs(unet)
        drawn[kept], _ = call_pipeline(pipeline, spec, ["a cat"], [1])
    assert torch.equal(drawn[True], expected)
    assert not torch.equal(drawn[False], expected), "or this test would show nothing"


def test_float32_is_whole(tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loaded(tiny_t2i)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_offload_is_refused_on_a_cpu(tiny_t2i: Path) -> None:
    with pytest.raises(InputError, match="offload 'model': is for GPUs"):
        loaded(tiny_t2i, offload="model")


def test_the_safety_checker_can_be_left_out(tiny_t2i: Path, tmp_path: Path) -> None:
    checked = save_with_safety_checker(tiny_t2i, tmp_path / "t2i", threshold=-2.0)
    assert loaded(checked).safety_checker is not None
    without = spec_of(checked, without=("safety_checker",))
    assert load_pipeline(without).safety_checker is None
    assert without.to_dict()["without"] == ("safety_checker",)
    assert not any(drawing.reason for drawing in DiffusersTextToImage(without).draw(REQUESTS[:2]))
