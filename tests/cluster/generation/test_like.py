"""jobs.generate --spec: another dataset's settings, all of them, and what is given beside them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.dataset.layout import MANIFEST_KEY
from cluster.generation.like import check_alike, read_spec, settings_of, with_spec
from cluster.generation.make import generate
from cluster.generation.pinning import dataset_spec
from cluster.generation.request import GenerateRequest
from cluster.options import given
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.spec import DatasetSpec
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus


def asked(**options: object) -> GenerateRequest:
    return GenerateRequest(corpus="captions.txt", out="out", spec="dataset.json", **options)  # type: ignore[arg-type]


@pytest.fixture
def spec(tiny_t2i: Path, tiny_clip: Path) -> DatasetSpec:
    """Of a request with every kind of setting away from its default."""
    request = GenerateRequest(
        corpus="captions.txt", out="out", t2i=str(tiny_t2i), clip=str(tiny_clip), steps=3, guidance_scale=4.5,
        width=64, height=32, scheduler="DPMSolverMultistepScheduler", scheduler_options={"use_karras_sigmas": True},
        negative_prompt="blurred", prompt_template="a photo of {caption}", images_per_caption=2, seed=9, max_attempts=5,
        image_format="webp", image_quality=80, clip_batch_size=7, batch_size=3, attention="eager", vae_slicing=True,
        prompt_cache=True, device="cpu", dtype="float32",
    )  # fmt: skip
    return dataset_spec(request, gpus=0)


def test_the_same_spec_comes_out(spec: DatasetSpec) -> None:
    found = dataset_spec(with_spec(asked(), spec), gpus=0)
    assert found == spec
    assert DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == found, "through dataset.json, too"


def test_every_setting_of_a_spec_has_an_option() -> None:
    """A field that is added to a spec must be taken over, or be one that no option decides."""
    taken = {
        *settings_of(null_spec()),
        *settings_of(replace(null_spec(), generator=replace(null_spec().generator, model="embedded"))),
    }
    renamed = {
        "model": "t2i", "revision": "t2i_revision", "variant": "t2i_variant", "without": "t2i_without",
        "config": "t2i_config", "loras": "lora", "num_inference_steps": "steps",
    }  # fmt: skip
    follow = {"vae_revision", "config_revision", "cpu_threads"}
    fields = set(null_spec().generator.__dataclass_fields__) - follow
    assert {renamed.get(name, name) for name in fields} <= taken


def test_what_is_given_beside_it_wins(spec: DatasetSpec) -> None:
    request = asked(seed=4, steps=2)
    own = set(given(request))
    found = dataset_spec(with_spec(request, spec), gpus=0)
    assert (found.seed, found.generator.num_inference_steps) == (4, 2)
    assert found == replace(spec, seed=4, generator=replace(spec.generator, num_inference_steps=2))
    check_alike(found, spec, own, uri="dataset.json")


def test_a_model_that_is_another_now_is_refused(spec: DatasetSpec) -> None:
    wanted = replace(spec, generator=replace(spec.generator, revision="sha256:another"))
    request = asked()
    found = dataset_spec(with_spec(request, wanted), gpus=0)
    with pytest.raises(InputError, match=r"--spec dataset.json: cannot be taken as it is \(generator.model: "):
        check_alike(found, wanted, set(given(request)), uri="dataset.json")


def test_another_model_has_its_own_revision(spec: DatasetSpec) -> None:
    repo = replace(spec, generator=replace(spec.generator, model="org/repo", revision="a" * 40))
    assert with_spec(asked(), repo).t2i_revision == "a" * 40
    assert with_spec(asked(t2i="org/other"), repo).t2i_revision is None
    found = dataset_spec(with_spec(asked(t2i="null", clip="null"), spec), gpus=0)
    assert found.generator.model == "null", "what only a model listens to is left out"


def test_what_is_no_manifest_of_drawn_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"--spec .*dataset\.json: "):
        read_spec(str(tmp_path / "dataset.json"))
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    document = json.loads((tmp_path / "data" / MANIFEST_KEY).read_bytes())
    document["spec"]["generator"]["model"] = "photos"
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"were not drawn by one generator here \(photos\)"):
        read_spec(str(tmp_path / "dataset.json"))
    with pytest.raises(InputError, match="--spec, --preset: give one of the two"):
        asked(preset="synthimgcap_coco")


def test_a_dataset_is_drawn_by_the_settings_of_another(tmp_path: Path, ray_session: None) -> None:
    corpus = write_corpus(tmp_path)
    options = {"corpus": str(corpus), "limit": 6, "shard_size": 3}
    generate(GenerateRequest(out=str(tmp_path / "one"), t2i="null", seed=5, image_format="png", **options))  # type: ignore[arg-type]
    manifest = tmp_path / "one" / MANIFEST_KEY
    generate(GenerateRequest(out=str(tmp_path / "two"), spec=str(manifest), **options))  # type: ignore[arg-type]
    one, two = (open_store(tmp_path / name).read_bytes("shards/part-000000.parquet") for name in ("one", "two"))
    assert one == two
