"""A preset is a set of arguments: what is given wins, and what it means is what its documentation says."""

import re
from pathlib import Path

import pytest

from cluster.generation import presets
from cluster.generation.pinning import dataset_spec
from cluster.generation.presets import GENERATION_PRESETS, with_preset
from cluster.generation.request import GenerateRequest
from jobs.generate import JOB
from pcm.errors import InputError
from pcm.spec import DatasetSpec
from tests.helpers.tiny_generation import null_spec, plan_dataset, write_corpus


def arguments(*given: str) -> GenerateRequest:
    """What the command line means; with a corpus where neither it nor a preset names one."""
    named = () if "--preset" in given else ("--corpus", "embedded")
    request = JOB.read(["--out", "nowhere", *named, *given])
    return with_preset(request, request.preset)


def spec(*given: str) -> DatasetSpec:
    return dataset_spec(arguments(*given), gpus=0)


@pytest.mark.parametrize("preset", GENERATION_PRESETS)
def test_a_preset_pins_model_steps_guidance_scheduler_and_features(preset: str) -> None:
    made = spec("--preset", preset)
    drawn = made.generator
    assert drawn.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert drawn.revision == "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "no hub is asked: a commit is a commit"
    assert (drawn.num_inference_steps, drawn.guidance_scale) == (20, 7.5)
    assert (drawn.scheduler, drawn.width, drawn.height) == ("DPMSolverMultistepScheduler", 512, 512)
    assert (made.clip.model, made.clip.revision) == ("ViT-L-14/openai", "open_clip:openai")
    assert (made.images_per_caption, made.seed) == (1, 0)


def test_presets_differ_by_their_corpus() -> None:
    corpora = {name: arguments("--preset", name).corpus for name in GENERATION_PRESETS}
    assert corpora == {
        "synthimgcap_coco": "dataset_coco.json", "synthimgcap_flickr30k": "dataset_flickr30k.json",
    }  # fmt: skip
    assert arguments("--preset", "synthimgcap_coco", "--corpus", "s3://bucket/x.json").corpus == "s3://bucket/x.json"


def test_an_argument_that_is_given_wins() -> None:
    made = spec(
        "--preset", "synthimgcap_coco", "--steps", "30", "--clip", "ViT-B-32/openai", "--guidance-scale", "0",
        "--compile",
    )  # fmt: skip
    assert (made.generator.num_inference_steps, made.generator.guidance_scale) == (30, 0.0)
    assert made.generator.scheduler == "DPMSolverMultistepScheduler", "what is not given is the preset's"
    assert (made.clip.model, made.generator.compile) == ("ViT-B-32/openai", "default")


def test_another_model_does_not_get_the_presets_commit(tiny_t2i: Path) -> None:
    args = arguments("--preset", "synthimgcap_coco", "--t2i", str(tiny_t2i))
    assert (args.t2i, args.t2i_revision, args.steps) == (str(tiny_t2i), None, 20)
    given = arguments("--preset", "synthimgcap_coco", "--t2i", "org/name", "--t2i-revision", "0" * 40)
    assert dataset_spec(given, gpus=0).generator.revision == "0" * 40


def test_without_a_preset_nothing_changes() -> None:
    made = spec()
    assert (made.generator.model, made.generator.num_inference_steps, made.clip.model) == ("embedded", 8, "embedded")


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"preset 'coco': not known; .*are synthimgcap_coco, synthimgcap_flickr30k"):
        arguments("--preset", "coco")


@pytest.mark.parametrize(
    "given", [["--generators", "8:2"], ["--clip-gpus", "0.95"], ["--clip-gpus", "x"], ["--node-label", "spot"]]
)
def test_pool_arguments_that_cannot_work_are_usage_errors(given: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        JOB.main(["--corpus", "embedded", "--out", "nowhere", *given])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.match(rf"error: {given[0]} '?{given[1]}'?: ", err) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch-size", "many"], "--batch-size many"),
        (["--scheduler", "LCMScheduler", "--scheduler-option", "karras"], "write NAME=VALUE"),
        (["--scheduler", "LCMScheduler", "--scheduler-option", "karras=true"], "LCMScheduler option 'karras'"),
    ],
)
def test_speed_arguments_that_cannot_work_are_refused_in_one_line(given: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        spec(*given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_speed_argument_reaches_the_spec() -> None:
    made = spec(
        "--attention", "sdpa", "--channels-last", "--compile", "reduce-overhead", "--vae-slicing", "--vae-tiling",
        "--prompt-cache", "--scheduler", "LCMScheduler", "--scheduler-option", "timestep_spacing=trailing",
        "--scheduler-option", "beta_start=0.001", "--batch-size", "4",
    ).generator  # fmt: skip
    assert (made.attention, made.compile, made.batch_size) == ("sdpa", "reduce-overhead", 4)
    assert made.channels_last and made.vae_slicing and made.vae_tiling and made.prompt_cache
    assert made.scheduler_options == (("beta_start", 0.001), ("timestep_spacing", "trailing"))


def test_what_the_documentation_says_is_what_the_presets_hold() -> None:
    text = presets.__doc__ or ""
    for stated in ("20 steps", "Guidance 7.5", "512x512", "ViT-L/14", "542,401", "144,541", "restval"):
        assert stated in text


def test_a_speed_option_on_a_dataset_begun_without_it_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    plan_dataset(tmp_path / "data", corpus, null_spec())
    with pytest.raises(InputError, match=r"generator\.channels_last: False -> True"):
        plan_dataset(tmp_path / "data", corpus, null_spec(channels_last=True))
