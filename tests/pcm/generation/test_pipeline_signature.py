"""What a pipeline's call takes is asked for, and nothing else; read from small files, without weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers

from pcm.errors import InputError
from pcm.generation.few_step_models import few_steps
from pcm.generation.pipeline_files import named_files, pipeline_revision
from pcm.generation.pipeline_signature import PipelineSignature, absent_parts, read_signature
from pcm.generation.scheduler import build_scheduler


def pipeline_of(folder: Path, name: object, *, scheduler: str = "DDIMScheduler", **configs: dict) -> Path:
    """A folder that says it is a pipeline of this class; there are no weights."""
    index = {"_class_name": name, "scheduler": ["diffusers", scheduler]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, config in configs.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def signature_of(tmp_path: Path):  # a function of a class name
    def read(name: str, **values: object) -> PipelineSignature:
        return read_signature(str(pipeline_of(tmp_path / name, name, **values)), None)

    return read


def test_defaults_are_those_of_the_call(signature_of) -> None:
    wanted = {
        "StableDiffusionPipeline": (50, 7.5), "StableDiffusionXLPipeline": (50, 5.0), "FluxPipeline": (28, 3.5),
        "StableDiffusion3Pipeline": (28, 7.0), "LatentConsistencyModelPipeline": (4, 8.5),
        "SanaPipeline": (20, 4.5), "QwenImagePipeline": (50, None),
    }  # fmt: skip
    for name, (steps, guidance_scale) in wanted.items():
        defaults = signature_of(name).defaults
        assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (steps, guidance_scale), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WanPipeline", "it makes videos"),
        ("Kandinsky5T2IPipeline", "it returns image, not images"),
        ("KandinskyV22Pipeline", "its call takes no prompt"),
        ("KandinskyV22PriorPipeline", "draws no pictures of prompts"),
        ("StableDiffusion9Pipeline", "is not in diffusers"),
        ("UNet2DConditionModel", "is not in diffusers"),
        (None, "names no pipeline"),
        (["my_pipeline", "MyPipe"], "a pipeline of its own code"),
    ],
)
def test_what_is_no_text_to_image_pipeline_is_refused_by_name(name: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_signature(str(pipeline_of(tmp_path / "t2i", name)), None)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_guidance_without_effect_is_refused(signature_of, tmp_path: Path) -> None:
    signature_of("StableDiffusionPipeline").check_guidance(3.0)
    with pytest.raises(InputError, match="true_cfg_scale=X guides it"):
        signature_of("QwenImagePipeline").check_guidance(3.0)
    read_signature(str(pipeline_of(tmp_path / "dev", "FluxPipeline", transformer={"guidance_embeds": True})), None)
    schnell = pipeline_of(tmp_path / "schnell", "FluxPipeline", transformer={"guidance_embeds": False})
    with pytest.raises(InputError, match="--guidance-scale 3: without effect on this FluxPipeline"):
        read_signature(str(schnell), None).check_guidance(3.0)


@pytest.mark.parametrize(
    ("name", "guidance_scale", "options", "refused"),
    [
        ("StableDiffusionPipeline", 7.5, {}, None),
        ("StableDiffusionXLPipeline", 0.0, {}, "without effect at guidance 0"),
        ("StableDiffusionXLPipeline", 1.0, {}, "without effect at guidance 1"),
        ("ZImagePipeline", 1.0, {}, None),
        ("ZImagePipeline", 0.0, {}, "without effect at guidance 0"),
        ("LatentConsistencyModelPipeline", 8.5, {}, "takes none"),
        ("FluxPipeline", 3.5, {}, "true_cfg_scale 1.0"),
        ("FluxPipeline", 3.5, {"true_cfg_scale": 2.0}, None),
        ("QwenImagePipeline", None, {}, None),
    ],
)
def test_a_negative_prompt_without_effect_is_refused(
    name: str, guidance_scale: float | None, options: dict, refused: str | None, signature_of
):
    signature = signature_of(name)
    if refused is None:
        signature.check_negative_prompt("blurry", guidance_scale, options)
        return
    with pytest.raises(InputError, match=refused):
        signature.check_negative_prompt("blurry", guidance_scale, options)


def test_true_guidance_without_a_negative_prompt_is_refused(signature_of) -> None:
    with pytest.raises(InputError, match="has no --negative-prompt"):
        signature_of("QwenImagePipeline").check_negative_prompt(None, None, {"true_cfg_scale": 4.0})


def test_a_second_negative_prompt_alone_is_refused_where_it_is_ignored(signature_of, tmp_path: Path) -> None:
    options = {"negative_prompt_2": "ugly"}
    for name in ("StableDiffusionXLPipeline", "FluxPipeline"):
        signature_of(name).check_further_negative_prompts("ugly", options)
        with pytest.raises(InputError, match="--pipeline-option negative_prompt_2: goes with --negative-prompt"):
            signature_of(name).check_further_negative_prompts(None, options)
    for name in ("StableDiffusion3Pipeline", "HiDreamImagePipeline"):
        signature_of(name).check_further_negative_prompts(None, options)
    folder = pipeline_of(tmp_path / "heeds", "StableDiffusionXLPipeline")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    read_signature(str(folder), None).check_further_negative_prompts(None, options)
    signature = signature_of("StableDiffusionXLPipeline")
    signature.check_negative_prompt("ugly", 5.0, options)
    with pytest.raises(InputError, match="without effect at guidance 1"):
        signature.check_negative_prompt("ugly", 1.0, options)


def test_pipeline_options_are_checked_by_name_and_type(signature_of) -> None:
    signature = signature_of("StableDiffusionPipeline")
    signature.check_options({"clip_skip": 1, "eta": 1, "guidance_rescale": 0.7})
    for options, said in (
        ({"clipskip": 1}, "did you mean 'clip_skip'"),
        ({"latents": 1}, "not known"),
        ({"width": 64}, "is set by --width"),
        ({"eta": "much"}, "takes float"),
        ({"eta": True}, "takes float"),
    ):
        with pytest.raises(InputError, match=said):
            signature.check_options(options)


def test_a_scheduler_that_the_model_cannot_take_is_refused(signature_of) -> None:
    flow = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    signature_of("StableDiffusionPipeline").check_scheduler("LCMScheduler", {"timestep_spacing": "trailing"})
    signature_of("StableDiffusion3Pipeline", **flow).check_scheduler(
        "UniPCMultistepScheduler", {"use_flow_sigmas": True}
    )
    for name, values, scheduler, said in (
        ("StableDiffusionXLPipeline", {}, "FlowMatchEulerDiscreteScheduler", "is no flow-matching model"),
        ("FluxPipeline", flow, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with"),
        ("LatentConsistencyModelPipeline", {"scheduler": "LCMScheduler"}, "DDIMScheduler", "needs LCMScheduler"),
        ("PixArtSigmaPipeline", {}, "NoScheduler", "not a diffusers scheduler"),
    ):
        with pytest.raises(InputError, match=said):
            signature_of(name, **values).check_scheduler(scheduler, {})


@pytest.mark.parametrize(
    ("options", "prediction_type", "shift"),
    [({}, "flow_prediction", 3.0), ({"flow_shift": 2.0, "prediction_type": "epsilon"}, "epsilon", 2.0)],
)
def test_a_solver_in_place_of_a_flow_models_own_scheduler_is_told_that_it_is_one(
    options: dict, prediction_type: str, shift: float
) -> None:
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = {"use_flow_sigmas": True} | options
    solver = build_scheduler(type(own).__name__, own.config, "UniPCMultistepScheduler", flow)
    assert (solver.config.prediction_type, solver.config.flow_shift) == (prediction_type, shift)
    if options:
        return
    picture, noise = torch.full((1, 4, 8, 8), 0.7), torch.randn((1, 4, 8, 8), generator=torch.manual_seed(0))
    solver.set_timesteps(20)
    latents = noise
    for time in solver.timesteps:
        latents = solver.step(noise - picture, time, latents, return_dict=False)[0]  # what an ideal model says
    torch.testing.assert_close(latents, picture, atol=1e-5, rtol=0.0)


def test_a_flow_models_scheduler_in_place_of_its_own_solver_keeps_the_shift() -> None:
    """Of Sana."""
    own = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for options, shift in (({}, 3.0), ({"shift": 2.0}, 2.0)):
        found = build_scheduler("DPMSolverMultistepScheduler", own, "FlowMatchEulerDiscreteScheduler", options)
        assert found.config.shift == shift


@pytest.mark.parametrize(
    ("name", "own", "asked", "said"),
    [
        ("StableDiffusionPipeline", "DDIMScheduler", {"name": "LCMScheduler", "steps": 60}, "--steps 60: LCMScheduler"),
        ("StableDiffusionPipeline", "DDIMScheduler", {"steps": 1001}, "--steps 1001: DDIMScheduler cannot do so"),
        ("StableDiffusionPipeline", "DDIMScheduler", {"steps": 1000}, None),
        ("LatentConsistencyModelPipeline", "LCMScheduler", {"steps": 60}, "--steps 60: LCMScheduler"),
        (
            "LatentConsistencyModelPipeline", "LCMScheduler",
            {"steps": 60, "pipeline_options": {"original_inference_steps": 60}}, None,
        ),
        ("SanaSprintPipeline", "SCMScheduler", {"steps": 2}, None),
        ("SanaSprintPipeline", "SCMScheduler", {"steps": 3}, "--steps 3: SCMScheduler"),
        ("StableDiffusionPipeline", "DDIMScheduler", {"options": {"beta_schedule": "cosine"}}, "cosine is not impl"),
        ("StableDiffusionPipeline", "DDIMScheduler", {"options": {"num_train_timesteps": "abc"}}, "abc: "),
        (
            "StableDiffusionPipeline", "DDIMScheduler",
            {"name": "DPMSolverMultistepScheduler", "options": {"algorithm_type": "foo"}}, "algorithm_type=foo: ",
        ),
        ("StableDiffusionPipeline", "DDIMScheduler", {"options": {"timestep_spacing": "foo"}}, "timestep_spacing=foo"),
    ],
)  # fmt: skip
def test_steps_and_values_that_a_scheduler_cannot_do_are_refused_in_one_line(
    name: str, own: str, asked: dict, said: str | None, tmp_path: Path
) -> None:
    folder = pipeline_of(tmp_path / "t2i", name, scheduler=own)
    getattr(diffusers, own)().save_pretrained(folder / "scheduler")
    values = {"steps": 4, "name": None, "options": {}, "pipeline_options": {}} | asked
    if said is None:
        read_signature(str(folder), None).check_steps(**values)
        return
    with pytest.raises(InputError, match=said) as caught:
        read_signature(str(folder), None).check_steps(**values)
    assert "\n" not in str(caught.value)


def test_steps_of_a_model_that_shifts_them_by_the_pictures_size_are_checked(tmp_path: Path) -> None:
    folder = pipeline_of(tmp_path / "flux", "FluxPipeline", scheduler="FlowMatchEulerDiscreteScheduler")
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    for scheduler, options in ((None, {}), ("UniPCMultistepScheduler", {"use_flow_sigmas": True})):
        read_signature(str(folder), None).check_steps(28, scheduler, options, {})


def test_a_prompt_cache_that_could_remember_nothing_is_refused(signature_of, tmp_path: Path) -> None:
    signature_of("StableDiffusionPipeline").check_prompt_cache()
    folder = pipeline_of(tmp_path / "lumina", "Lumina2Pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "Gemma2Model"]}))
    with pytest.raises(InputError, match=r"--prompt-cache: without effect on Lumina2Pipeline \(Gemma2Model\)"):
        read_signature(str(folder), None).check_prompt_cache()


def test_a_part_that_a_pipeline_was_saved_without_is_told_to_its_loader(tmp_path: Path) -> None:
    folder = pipeline_of(tmp_path / "sd3", "StableDiffusion3Pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert absent_parts(str(folder), None) == ("text_encoder_3",), "an image encoder is optional by itself"


def test_few_step_models_are_known_by_name() -> None:
    for name, steps, guidance_scale in (
        ("stabilityai/sd-turbo", 1, 0.0), ("stabilityai/sdxl-turbo", 1, 0.0), ("/models/sdxl-turbo/", 1, 0.0),
        ("black-forest-labs/FLUX.1-schnell", 4, 0.0), ("Tongyi-MAI/Z-Image-Turbo", 9, 0.0),
        ("stabilityai/stable-diffusion-3.5-large-turbo", 4, 0.0), ("black-forest-labs/FLUX.2-klein-4B", 4, 1.0),
        ("/m/sd_xl_turbo_1.0_fp16.safetensors", 1, 0.0), ("/m/sd_turbo.safetensors", 1, 0.0),
        ("/m/flux1-schnell.safetensors", 4, 0.0), ("/m/sd3.5_large_turbo.safetensors", 4, 0.0),
        ("/m/z_image_turbo_bf16.safetensors", 9, 0.0),
    ):  # fmt: skip
        found = few_steps(name)
        assert found is not None and (found.steps, found.guidance_scale) == (steps, guidance_scale), name
    for name in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "turbo-lovers/realistic",
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "/m/flux1-dev.safetensors",
        "/m/sd3.5_large.safetensors",
    ):
        assert few_steps(name) is None, name
    by_config = few_steps("/m/own.safetensors", config="black-forest-labs/FLUX.1-schnell")
    assert by_config is not None and (by_config.steps, by_config.guidance_scale) == (4, 0.0)
    assert few_steps("/m/z_image_bf16.safetensors", config="Tongyi-MAI/Z-Image-Turbo") is None, "all are configured so"


@pytest.mark.parametrize(
    ("lora", "steps", "guidance_scale"),
    [
        ("latent-consistency/lcm-lora-sdv1-5", 4, 1.0),
        ("latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", 4, 1.0),
        ("ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors", 4, 0.0),
        ("lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-8steps-V1.0.safetensors", 8, 0.0),
        ("ByteDance/Hyper-SD/Hyper-SDXL-1step-lora.safetensors", 1, 0.0),
        ("ByteDance/Hyper-SD/Hyper-SDXL-8steps-lora.safetensors", 8, 0.0),
        ("ByteDance/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors", 8, None),
        ("ByteDance/Hyper-SD/Hyper-SD15-12steps-CFG-lora.safetensors", 12, None),
        ("ByteDance/Hyper-SD/Hyper-SD3-4steps-CFG-lora.safetensors", 4, 3.0),
        ("ByteDance/Hyper-SD/Hyper-SD3-16steps-CFG-lora.safetensors", 16, 7.0),
        ("ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors", 8, None),
        ("/m/Hyper-FLUX.1-dev-16steps-lora.safetensors", 16, None),
    ],
)
def test_few_step_loras_are_known_by_name(lora: str, steps: int, guidance_scale: float | None) -> None:
    found = few_steps("stabilityai/sd-turbo", (lora,))
    assert found is not None and (found.steps, found.guidance_scale) == (steps, guidance_scale)
    assert few_steps("org/model", ("org/style/watercolour.safetensors",)) is None


def test_of_a_lora_on_disk_its_folder_counts_only_where_the_file_has_the_name_of_all(tmp_path: Path) -> None:
    for folder, name, steps in (
        ("lcm-lora", "style", None), ("hyper-8steps", "pokemon", None), ("style", "Hyper-SDXL-8steps-lora", 8),
        ("lcm-lora-sdxl", "pytorch_lora_weights", 4),
    ):  # fmt: skip
        file = tmp_path / folder / f"{name}.safetensors"
        file.parent.mkdir()
        file.touch()
        found = few_steps("org/model", (str(file),))
        assert (found and found.steps) == steps, file


def test_a_folders_revision_is_of_what_its_index_names(tiny_t2i: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_t2i, folder)
    revision = pipeline_revision(folder)
    assert revision == pipeline_revision(tiny_t2i), "wherever it lies"
    (folder / ".cache").mkdir()
    (folder / ".cache/download.lock").write_text("1")
    (folder / "unet/.gitattributes").write_text("1")
    (folder / "README.md").write_text("1")
    assert pipeline_revision(folder) == revision, "a download's bookkeeping"
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    assert pipeline_revision(folder) != revision
    with pytest.raises(InputError, match=r"--t2i-variant fp16: .* has no file of it"):
        named_files(folder, variant="fp16")
