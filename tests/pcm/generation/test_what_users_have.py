"""A single file of weights, LoRAs and another decoder give the pictures that the same weights give in a folder."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from cluster.generation.picture_spec import generator_spec
from cluster.generation.request import GenerateRequest
from pcm.errors import InputError
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Drawing
from pcm.generation.pipeline_loading import load_pipeline
from pcm.spec import GeneratorSpec
from tests.helpers.original_checkpoint import save_original
from tests.helpers.tiny_pipelines import save_pipeline
from tests.pcm.generation.test_diffusers_pipeline import REQUESTS, spec_of


def drawn(spec: GeneratorSpec) -> list[Drawing]:
    return DiffusersTextToImage(spec).draw(REQUESTS[:2])


@pytest.fixture(scope="module")
def plain(tiny_t2i: Path) -> list[Drawing]:
    return drawn(spec_of(tiny_t2i))


@pytest.fixture(scope="module")
def single(tiny_t2i: Path, tmp_path_factory: pytest.TempPathFactory) -> GeneratorSpec:
    """Of a file as model sites have it, with the original code's names, as a request gives it."""
    file = save_original(tiny_t2i, tmp_path_factory.mktemp("single") / "one.safetensors")
    asked = GenerateRequest(
        corpus="embedded", out="out", t2i=str(file), t2i_config=str(tiny_t2i), steps=2, guidance_scale=2.0,
        batch_size=4, image_format="png",
    )  # fmt: skip
    return generator_spec(asked, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lora(tiny_t2i: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_t2i, safety_checker=None)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def test_a_single_file_draws_what_its_folder_draws(single: GeneratorSpec, plain: list[Drawing]) -> None:
    assert single.revision.startswith("sha256:") and single.config_revision.startswith("sha256:")
    assert drawn(single) == plain


def test_a_single_file_is_a_few_step_model_by_its_configuration(
    single: GeneratorSpec, tiny_t2i: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_t2i, tmp_path / "sd-turbo")
    asked = GenerateRequest(corpus="embedded", out="out", t2i=single.model, t2i_config=str(tmp_path / "sd-turbo"))
    found = generator_spec(asked, device="cpu", dtype="float32")
    assert (found.num_inference_steps, found.guidance_scale) == (1, 0.0)


def test_a_single_file_without_hub_or_configuration_is_one_line(single: GeneratorSpec) -> None:
    asked = GenerateRequest(corpus="embedded", out="out", t2i=single.model)
    with pytest.raises(InputError, match=r"holds weights alone.*give --t2i-config FOLDER") as caught:
        generator_spec(asked, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_a_file_with_weights_of_another_kind_is_one_line(single: GeneratorSpec, lora: Path) -> None:
    with pytest.raises(InputError, match="the --t2i-config that fits them") as caught:
        drawn(dataclasses.replace(single, model=str(lora)))
    assert "\n" not in str(caught.value)


def test_a_lora_is_fused_with_its_weight(
    tiny_t2i: Path, single: GeneratorSpec, lora: Path, plain: list[Drawing]
) -> None:
    def with_loras(spec: GeneratorSpec, *weights: float) -> list[Drawing]:
        return drawn(dataclasses.replace(spec, loras=tuple((str(lora), "sha256:x", weight) for weight in weights)))

    folder = spec_of(tiny_t2i)
    whole = with_loras(folder, 1.0)
    assert whole[0].image != plain[0].image
    assert with_loras(folder, 0.0) == plain
    assert with_loras(folder, 0.5, 0.5) == whole, "two are added"
    assert with_loras(single, 1.0) == whole


def test_a_lora_is_fused_into_every_part_that_it_has_weights_for(tmp_path: Path) -> None:
    folder = save_pipeline("flux", tmp_path / "flux")
    whole = load_pipeline(spec_of(folder))
    before = {part: copy.deepcopy(getattr(whole, part).state_dict()) for part in ("transformer", "text_encoder")}
    weights = {}
    for part, layers in (("transformer", ["to_q", "to_k"]), ("text_encoder", ["q_proj", "v_proj"])):
        module = getattr(whole, part)
        module.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), adapter_name="one")
        found = get_peft_model_state_dict(module, adapter_name="one")
        weights |= {f"{part}.{name}": weight.contiguous() for name, weight in found.items()}
    save_file(weights, tmp_path / "lora.safetensors")
    fused = load_pipeline(spec_of(folder, loras=((str(tmp_path / "lora.safetensors"), "sha256:x", 1.0),)))
    for part, old in before.items():
        new = getattr(fused, part).state_dict()
        assert new.keys() == old.keys(), "no layer of its own is left"
        assert any(not torch.equal(new[name], old[name]) for name in old), part


def test_a_file_that_is_no_lora_of_the_model_is_refused(tiny_t2i: Path, single: GeneratorSpec) -> None:
    with pytest.raises(InputError) as caught:
        drawn(spec_of(tiny_t2i, loras=((single.model, "sha256:x", 1.0),)))
    assert "\n" not in str(caught.value)


def test_another_decoder_takes_the_place_of_the_models(
    tiny_t2i: Path, single: GeneratorSpec, plain: list[Drawing], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    config = diffusers.AutoencoderKL.load_config(tiny_t2i / "vae")
    diffusers.AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    other = {"vae": str(tmp_path / "vae"), "vae_revision": "sha256:x"}
    pictures = drawn(spec_of(tiny_t2i, **other))
    assert pictures[0].image != plain[0].image
    assert drawn(dataclasses.replace(single, **other)) == pictures
