"""What draws more of a dataset is what drew it: each of its models is named by the user, and has its digest."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.curation.redraw.own_generator import own_generator
from cluster.curation.refine_request import RefineRequest
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.generation.picture_spec import generator_spec
from cluster.generation.request import GenerateRequest
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.spec import GENERATOR_VERSION, GeneratorSpec
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

COMMIT = "0123456789" * 4


@pytest.fixture
def data(tmp_path: Path) -> OpenDataset:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    return open_dataset(open_store(tmp_path / "data"))


@pytest.fixture
def models(tmp_path: Path, tiny_t2i: Path) -> dict[str, Path]:
    """A generator, a decoder and two LoRAs; what the files of LoRAs hold does not matter until they are loaded."""
    shutil.copytree(tiny_t2i, tmp_path / "t2i")
    shutil.copytree(tiny_t2i / "vae", tmp_path / "vae")
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    return {"t2i": tmp_path / "t2i", "vae": tmp_path / "vae", "lora": tmp_path}


def places(models: dict[str, Path]) -> dict:
    loras = tuple(str(models["lora"] / f"{name}.safetensors") for name in ("one", "two"))
    return {"t2i": str(models["t2i"]), "vae": str(models["vae"]), "lora": loras}


def drawn_by(data: OpenDataset, spec: GeneratorSpec, *, version: int = GENERATOR_VERSION) -> OpenDataset:
    """The dataset, saying that this spec drew it."""
    recorded = replace(data.manifest.spec, generator=spec, generator_version=version)
    return replace(data, manifest=replace(data.manifest, spec=recorded))


def spec_of(models: dict[str, Path]) -> GeneratorSpec:
    """As jobs.generate pins it."""
    one, two = places(models)["lora"]
    asked = GenerateRequest(**{**places(models), "corpus": "embedded", "out": "out", "lora": ((one, 0.5), (two, 1.0))})
    return generator_spec(asked, device="cpu", dtype="float32")


def asked(**options: object) -> RefineRequest:
    return RefineRequest(data="DATA", out="out", method="best-of-n", **options)  # type: ignore[arg-type]


def test_what_drew_the_dataset_is_taken_where_it_lies_now(data: OpenDataset, models: dict, tmp_path: Path) -> None:
    spec = spec_of(models)
    assert own_generator(drawn_by(data, spec), asked(**places(models))) == spec
    (tmp_path / "moved").mkdir()
    for name in ("t2i", "vae", "one.safetensors", "two.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    moved = places({"t2i": tmp_path / "moved/t2i", "vae": tmp_path / "moved/vae", "lora": tmp_path / "moved"})
    found = own_generator(drawn_by(data, spec), asked(**moved))
    assert (found.model, found.vae) == (moved["t2i"], moved["vae"])
    assert [(name, weight) for name, _, weight in found.loras] == [(moved["lora"][0], 0.5), (moved["lora"][1], 1.0)]
    assert found.without_places() == spec.without_places()


@pytest.mark.parametrize(
    ("changed", "named"),
    [("t2i/vae/diffusion_pytorch_model.safetensors", "--t2i"), ("vae/config.json", "--vae"),
     ("two.safetensors", "--lora")],
)  # fmt: skip
def test_a_model_that_is_another_now_is_refused(
    data: OpenDataset, models: dict, tmp_path: Path, changed: str, named: str
) -> None:
    spec = spec_of(models)
    with (tmp_path / changed).open("ab") as file:
        file.write(b" ")
    said = f"^{named} .*: is sha256:.*, but DATA was drawn with sha256:.*; give that one"
    with pytest.raises(InputError, match=said):
        own_generator(drawn_by(data, spec), asked(**places(models)))


@pytest.mark.parametrize(("gone", "named"), [("t2i", "--t2i"), ("vae", "--vae"), ("two.safetensors", "--lora")])
def test_a_model_that_is_not_there_is_refused(
    data: OpenDataset, models: dict, tmp_path: Path, gone: str, named: str
) -> None:
    spec = spec_of(models)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"^{named} .*{gone}: is not there, but DATA was drawn with sha256:"):
        own_generator(drawn_by(data, spec), asked(**places(models)))


def test_a_single_files_configuration_is_compared(data: OpenDataset, models: dict, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    request = GenerateRequest(corpus="embedded", out="out", t2i=str(file), t2i_config=str(models["t2i"]))
    source = drawn_by(data, generator_spec(request, device="cpu", dtype="float32"))
    given = asked(t2i=str(file), t2i_config=str(models["t2i"]))
    assert own_generator(source, given).config == str(models["t2i"])
    (models["t2i"] / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^--t2i-config .*; give that one"):
        own_generator(source, given)


def test_a_commit_is_that_of_one_repo_and_loras_keep_their_order(data: OpenDataset) -> None:
    loras = (("org/lora/one.safetensors", COMMIT, 0.2), ("org/lora/two.safetensors", COMMIT, 1.0))
    spec = replace(data.manifest.spec.generator, model="org/t2i", revision=COMMIT, loras=loras)
    names = tuple(name for name, _, _ in loras)
    assert own_generator(drawn_by(data, spec), asked(t2i="org/t2i", lora=names)) == spec
    for options in (
        {"t2i": "org/other", "lora": names},
        {"t2i": "org/t2i", "lora": names[::-1]},
        {"t2i": "org/t2i", "lora": (names[0], "org/lora/three.safetensors")},
    ):
        with pytest.raises(InputError, match=rf"was drawn with org/.* at {COMMIT}; give that one"):
            own_generator(drawn_by(data, spec), asked(**options))
    with pytest.raises(InputError, match=r"--t2i org/t2i: .* was drawn with null; leave it out"):
        own_generator(data, asked(t2i="org/t2i"))


@pytest.mark.parametrize("version", [1, 2])
def test_the_embedded_model_of_another_release_is_refused(data: OpenDataset, version: int) -> None:
    """Named or not."""
    request = GenerateRequest(corpus="embedded", out="out", t2i="embedded")
    spec = generator_spec(request, device="cpu", dtype="float32", version=version)
    for options in ({}, {"t2i": "embedded"}):
        assert own_generator(drawn_by(data, spec, version=version), asked(**options)) == spec
        with pytest.raises(InputError, match="drawn with sha256:OTHER; only the release that drew it has that one"):
            own_generator(drawn_by(data, replace(spec, revision="sha256:OTHER"), version=version), asked(**options))


def test_a_place_that_the_dataset_alone_names_is_not_opened(data: OpenDataset, models: dict) -> None:
    given, source = places(models), drawn_by(data, spec_of(models))
    one, two = given["lora"]
    with pytest.raises(InputError, match=f"give --t2i {given['t2i']} --vae {given['vae']} --lora {one} --lora {two} "):
        own_generator(source, asked())
    with pytest.raises(InputError, match=rf"give --vae {given['vae']} \(vae= in Python\)"):
        own_generator(source, asked(**{**given, "vae": None}))


def test_what_the_dataset_was_drawn_without_is_refused(data: OpenDataset, models: dict) -> None:
    given = places(models)
    assert own_generator(data, asked()).model == "null"
    with pytest.raises(InputError, match=r"^--vae, --lora: DATA was drawn without; leave it out"):
        own_generator(data, asked(vae=given["vae"], lora=given["lora"]))
    with pytest.raises(InputError, match=r"^--lora: .* was drawn with 2; give each of these, in this order: "):
        own_generator(drawn_by(data, spec_of(models)), asked(**{**given, "lora": given["lora"][:1]}))


def test_a_repos_commit_needs_no_look_up(data: OpenDataset) -> None:
    spec = replace(
        data.manifest.spec.generator, model="org/t2i", revision=COMMIT, vae="org/vae", vae_revision=COMMIT,
        loras=(("org/lora/file.safetensors", COMMIT, 1.0),),
    )  # fmt: skip
    given = asked(t2i="org/t2i", vae="org/vae", lora=("org/lora/file.safetensors",))
    assert own_generator(drawn_by(data, spec), given) == spec
    pinned = {"vae": f"org/vae@{COMMIT}", "lora": (f"org/lora@{COMMIT}/file.safetensors",)}
    assert own_generator(drawn_by(data, spec), asked(t2i="org/t2i", **pinned)) == spec
    with pytest.raises(
        InputError, match=rf"--vae org/vae@{'b' * 40}: .* was drawn with org/vae at {COMMIT}; give that"
    ):
        own_generator(drawn_by(data, spec), asked(t2i="org/t2i", **{**pinned, "vae": f"org/vae@{'b' * 40}"}))
