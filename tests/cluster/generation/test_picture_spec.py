"""What a request means for the pictures: options that would have no effect are refused before Ray is started."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.dataset.documents import load_manifest
from cluster.dataset.plan import make_plan
from cluster.generation import make
from cluster.generation.make import generate
from cluster.generation.picture_spec import generator_spec
from cluster.generation.pinning import dataset_spec
from cluster.generation.request import GenerateRequest, parse_lora, parse_pipeline_option
from cluster.sources.corpus import read_corpus
from cluster.store.store import open_store
from cluster.weights import hub
from pcm.errors import InputError
from pcm.generation.prompt_length import truncation_check
from pcm.spec import GeneratorSpec
from tests.helpers.tiny_generation import CAPTIONS, plan_dataset, write_corpus
from tests.pcm.generation.test_pipeline_signature import pipeline_of


def spec_for(**asked: object) -> GeneratorSpec:
    return generator_spec(GenerateRequest(corpus="embedded", out="out", **asked), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 3, "batch_size": 2}, "--steps, --batch-size: without effect with --t2i null"),
        ({"prompt_template": "a photo of {caption}"}, "--prompt-template: without effect with --t2i null"),
        ({"lora": (("org/repo", 1.0),)}, "--lora: without effect with --t2i null"),
        ({"pipeline_options": {"clip_skip": 1}}, "--pipeline-option: without effect with --t2i null"),
    ],
)
def test_the_null_generator_refuses_what_only_a_model_listens_to(asked: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_for(t2i="null", **asked)


def test_the_null_clip_refuses_what_only_a_clip_listens_to() -> None:
    for asked, said in (
        ({"t2i": "null", "clip_batch_size": 4}, "--clip-batch-size: without effect with --clip null"),
        ({"clip": "null", "nouns": "en_core_web_sm"}, "--nouns: without effect with --clip null"),
    ):
        with pytest.raises(InputError, match=said):
            dataset_spec(GenerateRequest(corpus="embedded", out="out", **asked), gpus=0)


def test_what_an_earlier_release_took_without_effect_is_gone_on_with() -> None:
    """By the dataset's own command, and as the settings of another one (--spec)."""

    def asked(**named: Any) -> GenerateRequest:
        return GenerateRequest(corpus="embedded", out="out", **named)

    of_clip = asked(t2i="null", clip_batch_size=4)
    begun = dataset_spec(asked(t2i="null"), gpus=0)
    begun = replace(begun, clip=replace(begun.clip, batch_size=4))
    assert dataset_spec(of_clip, gpus=0, begun=begun) == dataset_spec(of_clip, gpus=0, own=()) == begun
    of_parts = asked(t2i_without=("text_encoder_3",))
    begun = dataset_spec(asked(), gpus=0)
    begun = replace(begun, generator=replace(begun.generator, without=("text_encoder_3",)))
    assert dataset_spec(of_parts, gpus=0, begun=begun) == dataset_spec(of_parts, gpus=0, own=()) == begun


def test_a_preset_asks_the_null_generator_for_nothing() -> None:
    from cluster.generation.presets import with_preset

    asked = with_preset(GenerateRequest(out="out", preset="synthimgcap_coco", t2i="null"), "synthimgcap_coco")
    assert generator_spec(asked, device="cpu", dtype="float32").model == "null"


def test_steps_and_guidance_are_the_first_that_is_said(tiny_t2i: Path, tmp_path: Path) -> None:
    embedded = spec_for()
    assert (embedded.num_inference_steps, embedded.guidance_scale) == (8, 3.0)
    own = spec_for(t2i=str(tiny_t2i))
    assert (own.num_inference_steps, own.guidance_scale) == (50, 7.5), "Stable Diffusion's"
    turbo = tmp_path / "sd-turbo"
    shutil.copytree(tiny_t2i, turbo)
    few = spec_for(t2i=str(turbo))
    assert (few.num_inference_steps, few.guidance_scale, few.revision) == (1, 0.0, own.revision)
    keeps = tmp_path / "Hyper-SD15-8steps-CFG-lora.safetensors"
    save_file({}, keeps)
    fused = spec_for(t2i=str(tiny_t2i), lora=((str(keeps), 1.0),))
    assert (fused.num_inference_steps, fused.guidance_scale) == (8, 7.5), "this one keeps the pipeline's guidance"
    given = spec_for(t2i=str(turbo), steps=3)
    assert (given.num_inference_steps, given.guidance_scale) == (3, 0.0)


def test_of_steps_and_guidance_what_was_not_asked_is_told(tiny_t2i: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for asked, said in (
        ({}, "50 steps and guidance 7.5, as nothing else was asked"),
        ({"steps": 2}, "guidance 7.5, as nothing else was asked"),
        ({"steps": 2, "guidance_scale": 3.0}, None),
    ):
        caplog.clear()
        spec_for(t2i=str(tiny_t2i), **asked)
        found = [message.partition("): ")[2] for message in caplog.messages if "was asked" in message]
        assert found == ([said] if said else [])


def test_a_model_that_is_guided_beside_a_negative_prompt_alone_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qwen = str(pipeline_of(tmp_path / "qwen", "QwenImagePipeline"))
    assert spec_for(t2i=qwen, negative_prompt=" ").negative_prompt == " " and not caplog.messages
    spec_for(t2i=qwen)
    (said,) = caplog.messages
    assert "(QwenImagePipeline): drawn without guidance" in said and "give --negative-prompt ' '" in said


def test_what_the_pipeline_lacks_is_refused(tiny_t2i: Path, tmp_path: Path) -> None:
    model = str(tiny_t2i)
    for asked, said in (
        ({"pipeline_options": {"clip_skipp": 1}}, "did you mean 'clip_skip'"),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, "--negative-prompt: without effect at guidance 1"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "no flow-matching model"),
        ({"t2i_variant": "fp16"}, "has no file of it"),
        ({"t2i_without": ("text_encoder_3",)}, "did you mean 'text_encoder'"),
        ({"t2i_config": "org/repo"}, "is for a single file"),
        ({"vae": str(tmp_path)}, "has no config.json"),
        ({"vae": "vae/model.safetensors"}, "--vae vae/model.safetensors: is a file; give the folder of a decoder"),
        ({"lora": ((str(tmp_path / "none.bin"), 1.0),)}, "no such file"),
    ):
        with pytest.raises(InputError, match=said):
            spec_for(t2i=model, **asked)
    for asked, said in (
        ({"t2i_without": ("text_encoder_3",)}, "did you mean 'text_encoder'"),
        ({"t2i_variant": "fp16"}, "has no file of it"),
    ):
        with pytest.raises(InputError, match=said):
            spec_for(**asked)  # of the embedded one
    with pytest.raises(InputError, match="--offload model: is for GPUs"):
        spec_for(t2i=model, offload="model", device="cpu")


def test_a_lora_is_named_by_the_digest_of_its_bytes(tiny_t2i: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_t2i / "unet/diffusion_pytorch_model.safetensors")
    save_file({"one": next(iter(weights.values()))}, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    ((name, digest, weight),) = spec_for(t2i=str(tiny_t2i), lora=((str(tmp_path / "a.safetensors"), 0.5),)).loras
    assert (name, weight) == (str(tmp_path / "a.safetensors"), 0.5) and digest.startswith("sha256:")


def test_steps_that_the_scheduler_cannot_do_are_refused(tiny_t2i: Path) -> None:
    assert spec_for(t2i=str(tiny_t2i), steps=100).num_inference_steps == 100
    with pytest.raises(InputError, match="--steps 101: DDIMScheduler cannot do so"):
        spec_for(t2i=str(tiny_t2i), steps=101)


OLD, NEW = "a" * 40, "b" * 40
REPOS = {"lora": (("org/lora", 1.0), ("org/loras/one.safetensors", 0.5)), "vae": "org/vae"}


@pytest.fixture
def moved_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repo has another commit than any dataset was begun with."""
    monkeypatch.setattr(hub, "look_up", lambda repo, revision, *, option: SimpleNamespace(sha=NEW))


def test_a_repo_is_pinned_at_its_newest_commit_or_the_one_that_is_named(tiny_t2i: Path, moved_hub: None) -> None:
    newest = spec_for(t2i=str(tiny_t2i), **REPOS)
    assert newest.loras == (("org/lora", NEW, 1.0), ("org/loras/one.safetensors", NEW, 0.5))
    assert (newest.vae, newest.vae_revision) == ("org/vae", NEW)
    loras = ((f"org/lora@{OLD}", 1.0), (f"org/loras@{OLD}/one.safetensors", 0.5))
    named = spec_for(t2i=str(tiny_t2i), lora=loras, vae=f"org/vae@{OLD}")
    assert named.loras == (("org/lora", OLD, 1.0), ("org/loras/one.safetensors", OLD, 0.5))
    assert (named.vae, named.vae_revision) == ("org/vae", OLD)


def test_a_single_files_configuration_is_pinned_likewise(
    tmp_path: Path, moved_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcm.generation.single_file.inferred_config", lambda file: "org/config")
    file = tmp_path / "one.safetensors"
    save_file({}, file)
    newest = spec_for(t2i=str(file))
    assert (newest.config, newest.config_revision) == ("org/config", NEW)
    assert spec_for(t2i=str(file), t2i_config=f"org/config@{OLD}") == replace(newest, config_revision=OLD)
    assert newest.num_inference_steps == 50
    begun = replace(newest, config_revision=OLD, num_inference_steps=3)
    request = GenerateRequest(corpus="embedded", out="out", t2i=str(file))
    assert generator_spec(request, device="cpu", dtype="float32", begun=begun) == begun


def test_what_is_gone_on_with_keeps_its_commits_steps_and_guidance(
    tiny_t2i: Path, tmp_path: Path, moved_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path, CAPTIONS[:3])
    asked = GenerateRequest(corpus=str(corpus), out=str(tmp_path / "out"), t2i=str(tiny_t2i), clip="null", **REPOS)
    spec = dataset_spec(asked, gpus=0)
    loras = tuple((name, OLD, weight) for name, _, weight in spec.generator.loras)
    begun = replace(spec.generator, loras=loras, vae_revision=OLD, num_inference_steps=3, guidance_scale=2.0)
    plan_dataset(tmp_path / "out", corpus, replace(spec, generator=begun))

    def ray_starts() -> None:
        raise RuntimeError("Ray starts")

    monkeypatch.setattr(make, "start_ray", ray_starts)
    with pytest.raises(RuntimeError, match="Ray starts"):
        generate(asked)
    with pytest.raises(InputError, match=rf"generator.vae_revision: '{OLD}' -> '{NEW}'\); use the same arguments"):
        generate(replace(asked, vae=f"org/vae@{NEW}"))
    model = replace(begun, model="org/t2i", revision=OLD, loras=(), vae=None, vae_revision=None)
    request = GenerateRequest(corpus="embedded", out="out", t2i="org/t2i")
    assert generator_spec(request, device="cpu", dtype="float32", begun=model) == model


def test_a_dataset_meets_another_device_before_anything_is_asked_of_the_cluster(
    tiny_t2i: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path, CAPTIONS[:3])
    asked = GenerateRequest(
        corpus=str(corpus), out=str(tmp_path / "out"), t2i=str(tiny_t2i), clip="null", batch_size="auto"
    )
    begun = dataset_spec(asked, gpus=0)
    plan_dataset(asked.out, corpus, replace(begun, generator=replace(begun.generator, batch_size=3)))

    def pools(*asked: object, **named: object) -> None:
        raise RuntimeError("machines are asked for")

    monkeypatch.setattr(make, "start_ray", lambda: None)
    monkeypatch.setattr(make, "check_reach", lambda store: None)
    monkeypatch.setattr(make, "pools_of_cluster", pools)
    monkeypatch.setattr(make, "device_of_cluster", lambda *asked, **named: "cuda")
    with pytest.raises(InputError, match="was begun on cpu, and this is cuda; give --device cpu, or another --out"):
        generate(replace(asked, shard_size=5))
    monkeypatch.setattr(make, "device_of_cluster", lambda *asked, **named: "cpu")
    with pytest.raises(RuntimeError, match="machines are asked for"):
        generate(replace(asked, shard_size=5))


def test_one_repo_that_is_several_things_keeps_a_commit_of_each(
    moved_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.generation.picture_spec._signature", lambda *asked: None)
    loras = ((f"org/x@{OLD}", 1.0), ("org/x", 0.5))
    asked = GenerateRequest(corpus="embedded", out="out", t2i="org/x", lora=loras, vae="org/x")
    now = generator_spec(asked, device="cpu", dtype="float32")
    assert (now.revision, now.vae_revision, [pin for _, pin, _ in now.loras]) == (NEW, NEW, [OLD, NEW])
    older = "c" * 40
    begun = replace(now, revision=older, loras=(("org/x", OLD, 1.0), ("org/x", older, 0.5)))
    assert generator_spec(asked, device="cpu", dtype="float32", begun=begun) == begun


def test_a_branch_or_a_file_that_is_not_there_is_no_repo_at_a_commit(tiny_t2i: Path, moved_hub: None) -> None:
    for asked, said in (
        ({"vae": "org/vae@main"}, "--vae org/vae@main: not there"),
        ({"lora": (("loras/style@v2.safetensors", 1.0),)}, "--lora loras/style@v2.safetensors: not there"),
    ):
        with pytest.raises(InputError, match=f"{said}, and no repo at a commit; after '@' give all its 40 digits"):
            spec_for(t2i=str(tiny_t2i), **asked)


def test_a_configuration_makes_a_file_a_few_step_model_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers takes FLUX.1-schnell's for every FLUX file without weights of guidance."""
    schnell = str(pipeline_of(tmp_path / "FLUX.1-schnell", "FluxPipeline", transformer={"guidance_embeds": False}))
    monkeypatch.setattr("pcm.generation.single_file.inferred_config", lambda file: schnell)
    file = tmp_path / "openflux.safetensors"
    save_file({}, file)
    assert spec_for(t2i=str(file)).num_inference_steps == 28
    assert spec_for(t2i=str(file), t2i_config=schnell).num_inference_steps == 4


def test_what_was_begun_with_a_second_negative_prompt_alone_is_gone_on_with(tmp_path: Path) -> None:
    sdxl = str(pipeline_of(tmp_path / "sdxl", "StableDiffusionXLPipeline"))
    asked = GenerateRequest(corpus="embedded", out="out", t2i=sdxl, negative_prompt="")
    asked = replace(asked, pipeline_options={"negative_prompt_2": "ugly"})
    begun = replace(generator_spec(asked, device="cpu", dtype="float32"), negative_prompt=None)
    asked = replace(asked, negative_prompt=None)
    assert generator_spec(asked, device="cpu", dtype="float32", begun=begun) == begun
    assert generator_spec(asked, device="cpu", dtype="float32", own={"seed"}) == begun, "it is another dataset's"
    with pytest.raises(InputError, match="negative_prompt_2: goes with --negative-prompt"):
        generator_spec(asked, device="cpu", dtype="float32")


def test_a_repo_that_cannot_be_looked_up_is_told_how_its_commit_is_given(tiny_t2i: Path) -> None:
    for asked, said in (
        ({"vae": "org/vae"}, "--vae org/vae@COMMIT"),
        ({"lora": (("org/loras/one.safetensors", 1.0),)}, "--lora org/loras@COMMIT/one.safetensors"),
        ({"t2i": "org/t2i"}, "--t2i-revision COMMIT"),
    ):
        with pytest.raises(InputError, match=rf"give a 40-digit commit \({said}\), or a local copy"):
            spec_for(**{"t2i": str(tiny_t2i), **asked})


def test_texts_of_options() -> None:
    assert parse_lora("org/repo") == ("org/repo", 1.0)
    assert parse_lora("/a/b.safetensors=0.8") == ("/a/b.safetensors", 0.8)
    assert parse_pipeline_option("true_cfg_scale=4") == ("true_cfg_scale", 4)
    assert parse_pipeline_option("use_resolution_binning=false") == ("use_resolution_binning", False)
    for text in ("org/repo=", "=1", "org/repo=much"):
        with pytest.raises(InputError, match="REPO_OR_FILE"):
            parse_lora(text)


def test_a_prompt_is_too_long_by_the_drawing_models_own_tokenizer(
    tiny_t2i: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "handlers", [caplog.handler])
    spec = dataset_spec(GenerateRequest(corpus="embedded", out="out", t2i=str(tiny_t2i), clip="null"), gpus=0)
    is_truncated = truncation_check(spec)
    assert not is_truncated("a" * 75) and is_truncated("a" * 76), "a letter is a token here, and start and end"
    assert not is_truncated("é" * 37) and is_truncated("é" * 38), "a token is a byte here"
    assert not truncation_check(dataset_spec(GenerateRequest(corpus="embedded", out="out", t2i="null"), gpus=0))(
        "a" * 999
    )
    assert "sequence length is longer" not in caplog.text


@pytest.mark.slow
def test_a_dataset_that_was_begun_under_the_first_rules_is_finished_under_them(
    tiny_t2i: Path, tmp_path: Path, ray_session: None
) -> None:
    corpus = write_corpus(tmp_path, CAPTIONS[:3])
    asked = GenerateRequest(corpus=str(corpus), out=str(tmp_path / "out"), t2i=str(tiny_t2i), clip="null", steps=2)
    before, now = dataset_spec(asked, gpus=0, version=1), dataset_spec(asked, gpus=0)
    assert before.generator.revision != now.generator.revision, "of every file, of what the index names"
    make_plan(
        open_store(asked.out),
        read_corpus(str(corpus)),
        before,
        corpus=str(corpus),
        shard_size=asked.shard_size,
        is_truncated=lambda prompt: False,
    )
    assert generate(asked)["stored"] == 3
    manifest = load_manifest(open_store(asked.out))
    assert (manifest.spec.generator_version, manifest.spec.generator.revision) == (1, before.generator.revision)
