"""Models of a dataset that lie elsewhere now: repairs and retries are told where, and record where they were."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.dataset.documents import Plan, load_manifest, load_plan
from cluster.dataset.keys import PLAN_KEY, shard_key
from cluster.dataset.request import VerifyRequest
from cluster.generation import make
from cluster.generation.make import generate
from cluster.generation.measured import _try_generator
from cluster.generation.moved_models import ModelPlaces
from cluster.generation.picture_spec import _pin_config, pin_t2i
from cluster.generation.pipeline import write_manifest
from cluster.generation.redraw_check import batches, choose, draw_again, plans_of
from cluster.generation.request import GenerateRequest
from cluster.generation.stages.draw import DrawShard
from cluster.generation.verify_dataset import verify_dataset
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.spec import GeneratorSpec
from tests.cluster.dataset.test_view import make_view
from tests.helpers.tiny_generation import (
    CAPTIONS,
    draw_in_process,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    tiny_spec,
    write_corpus,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path) -> Path:
    """Five captions in two shards, drawn by a model that has gone from where it was."""
    folder = tmp_path_factory.mktemp("moved")
    spec = tiny_spec(Path(shutil.copytree(tiny_t2i, folder / "old")), num_inference_steps=1)
    store, plan = plan_dataset(folder / "data", write_corpus(folder, CAPTIONS[:5]), spec, shard_size=3)
    write_manifest(store, plan, draw_in_process(store, plan, [0, 1]))
    (folder / "old").rename(folder / "new")
    return folder


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Store:
    """A copy to damage."""
    return open_store(shutil.copytree(drawn / "data", tmp_path / "data"))


def test_a_repair_draws_with_the_model_where_it_is_now(
    drawn: Path, data: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_pipeline(store: Store, plan: Plan, pools: object, *, redo: list[int], **settings: object) -> None:
        write_manifest(store, plan, draw_in_process(store, plan, redo))

    monkeypatch.setattr("cluster.generation.repair.start_ray", lambda: None)
    monkeypatch.setattr("cluster.generation.repair.pools_of_cluster", lambda *, device: None)
    monkeypatch.setattr("cluster.generation.repair.run_pipeline", run_pipeline)
    before, manifest, plan = data.read_bytes(shard_key(1)), load_manifest(data), data.read_bytes(PLAN_KEY)
    Path(data.path(shard_key(1))).write_bytes(b"damaged")
    Path(data.path(load_plan(data).part_key(1))).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"^--t2i embedded: is .*, but .*data was drawn with sha256:.*; give that"):
        verify_dataset(VerifyRequest(dataset=data.root, repair=True, t2i="embedded"))
    found = verify_dataset(VerifyRequest(dataset=data.root, repair=True, t2i=str(drawn / "new")))
    assert found["ok"] and found["repaired"] == 1 and data.read_bytes(shard_key(1)) == before
    assert data.read_bytes(PLAN_KEY) == plan and load_manifest(data).fingerprint == manifest.fingerprint
    assert load_manifest(data).spec == manifest.spec


def test_a_place_needs_a_repair() -> None:
    with pytest.raises(InputError, match="--t2i a: needs --repair"):
        VerifyRequest(dataset="data", t2i="a")
    with pytest.raises(InputError, match="--clip a: needs --repair"):
        VerifyRequest(dataset="data", redraw=1, clip="a")


def test_verify_redraws_with_the_model_where_it_is_now(drawn: Path, data: Store, tmp_path: Path) -> None:
    """Of a dataset, and of a view of it and of one whose generator has not moved."""
    make_dataset_in_process(tmp_path / "null", write_corpus(tmp_path, CAPTIONS[:2]), null_spec())
    make_view(tmp_path / "view", [Path(data.prefix), tmp_path / "null"], [(0, 0), (0, 4), (1, 0)])
    view = open_store(tmp_path / "view")
    here = ModelPlaces(t2i=str(drawn / "new"))
    for shown, count in ((data, 5), (view, 3)):
        with pytest.raises(InputError, match=r"which is not there now; .* give --t2i with its place"):
            plans_of(shown)
        with pytest.raises(InputError, match=r"^--t2i embedded: is .* was drawn with .*; give that one"):
            plans_of(shown, ModelPlaces(t2i="embedded"))
        chosen, others = choose(shown, plans_of(shown, here), count=9, seed=0)
        assert others == 0 and sum(len(each.rows) for each in chosen) == count
        for each in chosen:
            for spec, rows in batches(each.spec, each.rows):
                assert draw_again(each.store, spec, rows)[0] == rows["image"].to_pylist()


def test_what_needs_no_generator_is_told_where_the_clip_is_without_one(data: Store) -> None:
    """The generator is not where it was, and words and plan parts are made without it."""
    plan = load_plan(data)
    assert plan is not None
    with pytest.raises(InputError, match=r"--t2i .*: is not there, but .* was drawn with"):
        ModelPlaces().generator_at(plan.spec.generator, version=plan.spec.generator_version, data="data")
    assert ModelPlaces(clip=plan.spec.clip.model).plan_at(data, plan) == plan


def test_one_sample_and_quarantined_ones_are_drawn_with_the_model_where_it_is_now(
    drawn: Path, data: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(drawn / "new")
    assert generate(GenerateRequest(out=data.root, only="000000001-00", t2i=here))["matches"]
    tried: list[Plan] = []
    monkeypatch.setattr(make, "start_ray", lambda: None)
    monkeypatch.setattr(make, "pools_of_cluster", lambda request, *, device: None)
    monkeypatch.setattr(make, "retry_quarantined", lambda store, plan, *rest, **named: tried.append(plan) or {})
    generate(GenerateRequest(out=data.root, retry_quarantined="nan_image", t2i=here))
    (plan,) = tried
    assert plan == load_plan(data) and plan.spec_to_load.generator.model == here
    with pytest.raises(InputError, match=r"^--t2i embedded: is .* was drawn with .*; give that one"):
        generate(GenerateRequest(out=data.root, retry_quarantined="nan_image", t2i="embedded"))


def test_each_part_is_compared_by_its_digest(tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> None:
    def copied(place: str) -> tuple[Path, ...]:
        folder = tmp_path / place
        shutil.copytree(tiny_t2i, folder / "t2i")
        shutil.copytree(tiny_t2i / "vae", folder / "vae")
        shutil.copytree(tiny_clip, folder / "clip")
        shutil.copy(tiny_t2i / "unet/diffusion_pytorch_model.safetensors", folder / "lora.safetensors")
        return folder / "t2i", folder / "clip", folder / "vae", folder / "lora.safetensors"

    t2i, clip, vae, lora = copied("old")
    spec = tiny_spec(t2i, clip)
    asked = GenerateRequest(
        corpus="embedded", out="out", t2i=str(t2i), clip=str(clip), vae=str(vae), lora=((str(lora), 0.5),)
    )
    generator = make.dataset_spec(asked, gpus=0).generator
    names = {name: getattr(generator, name) for name in ("vae", "vae_revision", "loras")}
    store, plan = plan_dataset(
        tmp_path / "data", write_corpus(tmp_path), replace(spec, generator=replace(spec.generator, **names))
    )
    new = [str(path) for path in copied("new")]
    shutil.rmtree(tmp_path / "old")
    places = ModelPlaces(t2i=new[0], clip=new[1], vae=new[2], lora=((new[3], None),))
    moved = places.plan_at(store, plan).spec_to_load
    assert (moved.generator.model, moved.clip.model, moved.generator.vae) == tuple(new[:3])
    assert moved.generator.loras == ((new[3], plan.spec.generator.loras[0][1], 0.5),)
    for wrong, said in (
        (replace(places, lora=((new[3], 1.0),)), r"^--lora .*=1: .* was drawn with weight 0.5; give .*=0.5$"),
        (replace(places, lora=((new[3], None), (new[3], None))), "^--lora: .* was drawn with 1; give each of these"),
        (replace(places, t2i_config="a"), "^--t2i-config: .* was drawn without; leave it out"),
        (ModelPlaces(t2i=new[0]), r"^--vae .*old/vae: is not there, but .* was drawn with"),
        (replace(places, vae=str(tiny_t2i)), "has no config.json"),
        (replace(places, clip="embedded"), "clip.revision"),
    ):
        with pytest.raises(InputError, match=said):
            wrong.plan_at(store, plan)


def test_a_process_that_starts_again_refuses_a_model_that_was_replaced(
    tmp_path: Path, tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of a generator alike."""
    place = Path(shutil.copytree(tiny_t2i, tmp_path / "t2i"))
    vae = Path(shutil.copytree(tiny_t2i / "vae", tmp_path / "vae"))
    lora, single = tmp_path / "lora.safetensors", tmp_path / "one.safetensors"
    weights = place / "unet/diffusion_pytorch_model.safetensors"
    for name in (lora, single):
        shutil.copy(weights, name)
    asked = {"t2i": str(place), "clip": "null", "vae": str(vae), "lora": ((str(lora), 0.5),)}
    whole = make.dataset_spec(GenerateRequest(corpus="embedded", out="out", **asked), gpus=0)
    file = GeneratorSpec(
        model=str(single),
        revision=pin_t2i(str(single), None),
        config=str(place),
        config_revision=_pin_config(str(place)),
    )
    loaded: list[GeneratorSpec] = []
    monkeypatch.setattr("cluster.generation.stages.draw.load_generator", loaded.append)
    store = open_store(tmp_path)
    cases = [
        (whole, "t2i", weights),
        (whole, "vae", vae / "config.json"),
        (whole, "lora", lora),
        (replace(whole, generator=file), "t2i", Path(file.model)),
        (replace(whole, generator=file), "t2i-config", place / "scheduler/scheduler_config.json"),
    ]
    for spec, option, changed in cases:
        DrawShard(store, spec)
        before = changed.read_bytes()
        changed.write_bytes(before + b" ")
        with pytest.raises(InputError, match=rf"^--{option} .*: its files are sha256:\w+, but sha256:\w+ were pinned"):
            DrawShard(store, spec)
        changed.write_bytes(before)
        DrawShard(store, spec)
    assert len(loaded) == 2 * len(cases)
    old = replace(whole.generator, model="embedded", vae=None, vae_revision=None, loras=())
    with pytest.raises(InputError, match=r"^--t2i embedded: .* go on with the release that began it, or begin another"):
        DrawShard(store, replace(whole, generator=old))


def test_so_does_a_measurement(tmp_path: Path, tiny_t2i: Path) -> None:
    spec = tiny_spec(Path(shutil.copytree(tiny_t2i, tmp_path / "t2i")))
    (tmp_path / "t2i/unet/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^--t2i .*: its files are .* were pinned"):
        list(_try_generator(spec, 1.0, search=False))
