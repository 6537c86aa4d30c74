"""jobs.verify --redraw: stored pictures drawn again, and how far off they are."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset import environment
from cluster.dataset.documents import load_manifest
from cluster.dataset.environment import (
    DRAWN_IN,
    differences,
    joined_versions,
    store_environment,
    stored_environments,
)
from cluster.dataset.keys import MANIFEST_KEY, stats_key
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.request import VerifyRequest
from cluster.generation.redraw_check import Chosen, batches, choose, draw_again, plans_of
from cluster.generation.redraw_compare import ROUNDING, Again, compare, paired, pixel_difference
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.images import encode_image
from tests.cluster.dataset.test_view import make_view
from tests.helpers.faulty_generators import RAISES
from tests.helpers.faulty_pipeline import DrawFaultyPipeline
from tests.helpers.job_runs import JobRun
from tests.helpers.tiny_generation import (
    CAPTIONS,
    draw_in_process,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    tiny_spec,
    write_corpus,
)
from tests.helpers.waiting import all_cpus_held_until


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset_in_process(folder / "drawn", write_corpus(folder), tiny_spec(tiny_t2i), shard_size=5)
    return folder / "drawn"


def chosen(data: Path, *, count: int, seed: int = 0) -> list[Chosen]:
    store = open_store(data)
    return choose(store, plans_of(store), count=count, seed=seed)[0]


def again(data: Path, *, count: int = 10, seed: int = 0) -> dict:
    pairs: list[Again] = []
    for each in chosen(data, count=count, seed=seed):
        for spec, rows in batches(each.spec, each.rows):
            pictures, now = draw_again(each.store, spec, rows)
            pairs += paired(rows, pictures, each.known, now)
    return compare(pairs)


def drawn_elsewhere(data: Path, shard: int, **versions: str) -> None:
    """A dataset that says of a shard that packages of these versions drew it."""
    store = open_store(data)
    stats = json.loads(store.read_bytes(stats_key(shard)))
    found = environment.load_environment(store, stats[DRAWN_IN])
    assert found is not None
    stats[DRAWN_IN] = store_environment(store, {**found, "versions": found["versions"] | versions})
    store.write_bytes(stats_key(shard), json.dumps(stats).encode())


def test_all_are_identical_where_they_were_drawn(drawn: Path) -> None:
    found = again(drawn)
    assert (found["redrawn"], found["identical"], found["failed"]) == (10, 10, 0)
    assert found["environment_differs"] == [] and found["examples"] == [] and found["ok"]


def test_the_choice_follows_from_the_seed(drawn: Path) -> None:
    def ids(seed: int, count: int = 10) -> list[str]:
        (found,) = chosen(drawn, count=count, seed=seed)
        return found.rows["sample_id"].to_pylist()

    assert ids(1) == ids(1) and ids(1) != ids(2) and len(ids(1)) == 10
    assert len(ids(0, count=999)) == 24


def with_other_picture(data: Path, out: Path) -> Store:
    """A copy of a dataset in whose first shard the first picture is that of the second, with the manifest saying so."""
    shutil.copytree(data, out)
    store = open_store(out)
    key = "shards/part-000000.parquet"
    table = pq.read_table(out / key)
    images = table["image"].to_pylist()
    images[0] = {"bytes": images[1]["bytes"], "path": images[0]["path"]}
    at = table.schema.get_field_index("image")
    table = table.set_column(at, table.schema.field("image"), pa.array(images, table.schema.field("image").type))
    data_bytes = parquet_bytes(table)
    store.write_bytes(key, data_bytes)
    document = json.loads((out / MANIFEST_KEY).read_bytes())
    document["shards"][0] |= {"sha256": hashlib.sha256(data_bytes).hexdigest(), "bytes": len(data_bytes)}
    store.write_bytes(MANIFEST_KEY, json.dumps(document).encode())
    return store


def test_a_picture_that_differs_is_measured_and_is_no_success(drawn: Path, tmp_path: Path) -> None:
    with_other_picture(drawn, tmp_path / "other")
    found = again(tmp_path / "other", count=24)
    assert (found["redrawn"], found["identical"], found["ok"]) == (24, 23, False)
    assert found["largest_difference"] > 0 and 0 < found["mean_difference"] <= found["largest_difference"]
    assert [each["sample_id"] for each in found["examples"]] == ["000000000-00"]


def test_each_picture_is_compared_with_the_machine_of_its_own_shard(drawn: Path, tmp_path: Path) -> None:
    """Drawn by two kinds of machine, redrawn by the one: the pictures of the other one have a reason, and no others."""
    with_other_picture(drawn, tmp_path / "other")
    drawn_elsewhere(tmp_path / "other", 1, torch="1.0")
    found = again(tmp_path / "other", count=24)
    (example,) = found["examples"]
    assert (example["sample_id"], example["fault"], example["environment_differs"]) == (
        "000000000-00", "unexplained", [],
    )  # fmt: skip
    assert not found["ok"] and found["unexplained"] == 1, "the other shard's machine is no excuse"
    drawn_elsewhere(tmp_path / "other", 0, torch="0.9")
    found = again(tmp_path / "other", count=24)
    (example,) = found["examples"]
    assert example["environment_differs"][0].startswith("torch: 0.9 -> ") and len(example["environment_differs"]) == 1
    assert [line.partition(" -> ")[0] for line in found["environment_differs"]] == ["torch: 0.9", "torch: 1.0"]
    assert found["unexplained"] == 0


def test_a_dataset_that_says_no_machine_is_told_so(drawn: Path, tmp_path: Path) -> None:
    store = with_other_picture(drawn, tmp_path / "other")
    for key in store.list("environments/"):
        store.delete(key)
    found = again(tmp_path / "other", count=24)
    assert found["environment_differs"] == ["not known: the dataset does not say where it was drawn"]
    assert found["unexplained"] == 0


TORCH = ("torch: 2.9.1 -> 2.10.0",)


def shifted(levels: int, *, machine: tuple[str, ...], size: int = 8) -> Again:
    """A picture, and one drawn that is so many levels brighter; no size: nothing was drawn."""
    grey = np.full((8, 8, 3), 100, np.uint8)
    other = np.full((size, size, 3), 100 + levels, np.uint8)
    stored, found = (encode_image(each, image_format="png", quality=95) for each in (grey, other)) if size else ("", "")
    return Again("000000000-00", stored or b"grey", found or b"", machine)


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (shifted(1, machine=()), "unexplained"),
        (shifted(1, machine=TORCH), None),
        (shifted(int(ROUNDING), machine=TORCH), None),
        (shifted(int(ROUNDING) + 1, machine=TORCH), "far_off"),
        (shifted(155, machine=("pcmnet-ray: 0.2.0 -> 0.2.1",)), "unexplained"),
        (shifted(1, machine=("pcmnet-ray: 0.2.0 -> 0.2.1",)), "unexplained"),
        (shifted(1, machine=("pcmnet-ray: 0.2.0 -> 0.2.1", *TORCH)), None),
        (shifted(0, machine=TORCH, size=16), "far_off"),
    ],
)
def test_only_another_machine_excuses_a_difference_and_only_a_small_one(pair: Again, fault: str | None) -> None:
    found = compare([pair, shifted(0, machine=pair.elsewhere)])
    assert (found["redrawn"], found["identical"], found["ok"]) == (2, 1, fault is None)
    assert [each["fault"] for each in found["examples"]] == [fault]
    assert (found["unexplained"], found["far_off"]) == (int(fault == "unexplained"), int(fault == "far_off"))
    assert found["environment_differs"] == list(pair.elsewhere)


def test_a_picture_that_can_no_longer_be_drawn_is_no_success_anywhere() -> None:
    found = compare([Again("a", shifted(0, machine=()).stored, b"", TORCH)])
    assert (found["failed"], found["other_size"], found["far_off"], found["ok"]) == (1, 0, 1, False)


def test_a_shard_whose_bad_pictures_were_drawn_later_has_two_machines(tmp_path: Path, tiny_t2i: Path) -> None:
    corpus = write_corpus(tmp_path, [*CAPTIONS[:2], RAISES])
    store, plan, _ = make_dataset_in_process(tmp_path / "data", corpus, tiny_spec(tiny_t2i), finish=False)
    draw_in_process(store, plan, [0], draw=DrawFaultyPipeline)
    drawn_elsewhere(tmp_path / "data", 0, torch="1.0")
    draw_in_process(store, plan, [0], draw=DrawShard, retry=frozenset(["generator_error"]))
    stats = json.loads(store.read_bytes(stats_key(0)))
    first, second = environment.drawn_in(stats)
    assert first != second and {first, second} == {key[13:-5] for key in store.list("environments/")}
    assert len(stored_environments(store)) == 2


def view_of(out: Path, places: list[Path], rows: list[tuple[int, int]]) -> Path:
    make_view(out, places, rows)
    return out


def test_a_view_has_the_pictures_of_its_sources_drawn_again(drawn: Path, tmp_path: Path, tiny_t2i: Path) -> None:
    """From two datasets, each by its own plan; a picture that two rows show is drawn once."""
    corpus = write_corpus(tmp_path, CAPTIONS[:4])
    make_dataset_in_process(tmp_path / "two", corpus, tiny_spec(tiny_t2i, num_inference_steps=1), shard_size=3)
    view = view_of(tmp_path / "view", [drawn, tmp_path / "two"], [(0, 3), (0, 3), (0, 20), (1, 1), (1, 3)])
    found = again(view)
    assert (found["redrawn"], found["identical"], found["ok"]) == (4, 4, True)
    assert {each.store.address for each in chosen(view, count=9)} == {str(drawn), str(tmp_path / "two")}
    with_other_picture(tmp_path / "two", tmp_path / "changed")
    found = again(view_of(tmp_path / "of_changed", [tmp_path / "changed"], [(0, 0), (0, 1)]))
    assert (found["redrawn"], found["identical"], found["ok"]) == (2, 1, False)


def test_pictures_of_a_view_that_no_plan_says_how_to_draw_are_counted(drawn: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"  # holds its pictures, and has no plan
    make_view(whole, [drawn], [(0, 5), (0, 6)], materialise=True)
    store = open_store(view_of(tmp_path / "view", [drawn, whole], [(0, 1), (1, 0), (1, 1)]))
    found, others = choose(store, plans_of(store), count=3, seed=0)
    assert ([len(each.rows) for each in found], others) == ([1], 2)
    with pytest.raises(InputError, match=r"no pictures of .* were drawn here"):
        plans_of(open_store(view_of(tmp_path / "none", [whole], [(0, 0)])))
    with pytest.raises(InputError, match="a derived dataset cannot be drawn again"):
        plans_of(open_store(whole))


def test_pixels_are_compared_in_levels() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    other = pixels.copy()
    other[0, 0, 0] = 148

    def png(values: np.ndarray) -> bytes:
        return encode_image(values, image_format="png", quality=95)

    assert pixel_difference(Again("a", png(pixels), png(other))) == (48, 1.0)
    assert pixel_difference(Again("a", png(pixels), png(pixels[:2]))) is None


def test_a_picture_is_drawn_with_the_attempt_and_the_batch_that_made_it(drawn: Path) -> None:
    """Rows that say they were drawn in smaller batches are drawn in these, apart from the others."""
    (found,) = chosen(drawn, count=8)
    sizes = pa.array([4, 4, 2, 4, 2, 4, 4, 4], pa.int32())
    rows = found.rows.set_column(found.rows.column_names.index("batch_size"), "batch_size", sizes)
    work = list(batches(found.spec, rows))
    assert [(spec.generator.batch_size, len(part)) for spec, part in work] == [(2, 2), (4, 6)]
    assert all(spec.generator.max_attempts == 1 for spec, _ in work)


def test_the_manifest_says_where_it_was_drawn_and_by_what(drawn: Path) -> None:
    manifest = load_manifest(open_store(drawn))
    (found,) = manifest.environments
    assert found == environment.environment(device="cpu", loads_models=True)
    assert {"pcmnet-ray", "torch", "diffusers", "transformers", "open_clip_torch", "pillow"} <= manifest.versions.keys()
    assert found["instructions"] and found["processor"] and found["gpu"] is None


def test_a_machine_that_dies_before_it_has_drawn_a_shard_is_no_part_of_the_dataset(tmp_path: Path) -> None:
    class Dies(DrawShard):
        def draw(self, plan: pa.Table) -> pa.Table:
            raise KeyboardInterrupt

    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:2]), null_spec())
    with pytest.raises(KeyboardInterrupt):
        draw_in_process(store, plan, [0], draw=Dies)
    assert environment.stored_environments(store) == ()
    draw_in_process(store, plan, [0])
    assert len(environment.stored_environments(store)) == 1


def test_environments_of_two_kinds_are_both_said() -> None:
    one = {"versions": {"torch": "1", "pillow": "3"}, "processor": "a", "instructions": "AVX2", "gpu": None}
    two = {**one, "versions": {"torch": "2", "pillow": "3"}, "instructions": "AVX512"}
    assert joined_versions([one, two]) == {"torch": "1 and 2", "pillow": "3"}
    assert differences([one, two], two) == []
    assert differences([one], two) == ["torch: 1 -> 2", "instructions: AVX2 -> AVX512"]
    assert differences([], one) == []


def test_what_was_not_drawn_here_is_refused(tmp_path: Path, call_job: Callable[..., JobRun]) -> None:
    ended = call_job("verify", tmp_path, "--redraw", 5)
    assert ended.returncode == 2 and "not a dataset" in ended.stderr
    ended = call_job("verify", tmp_path, "--seed", 5)
    assert ended.returncode == 2 and "--redraw" in ended.stderr
    with pytest.raises(InputError, match="--redraw: give it without --repair"):
        VerifyRequest(dataset=str(tmp_path), repair=True, redraw=3)


def test_another_model_at_the_same_place_is_named_before_anything_is_drawn(
    tmp_path: Path, tiny_t2i: Path, call_job: Callable[..., JobRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dataset, and of a view that shows one of its pictures."""
    monkeypatch.setattr("cluster.generation.redraw_check.start_ray", lambda: pytest.fail("Ray was started"))
    model = shutil.copytree(tiny_t2i, tmp_path / "t2i")
    spec = tiny_spec(model, num_inference_steps=1)
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:2]), spec)
    view = view_of(tmp_path / "view", [tmp_path / "data"], [(0, 0)])
    assert again(view, count=1)["ok"]
    with (model / "unet" / "config.json").open("a") as file:
        file.write(" ")
    for data in (tmp_path / "data", view):
        ended = call_job("verify", data, "--redraw", 1)
        assert ended.returncode == 2
        assert f"with --t2i {model} at {spec.generator.revision}, which is sha256:" in ended.stderr
    model.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="which is not there now; put that one there again"):
        plans_of(open_store(view))


def test_on_ray_and_in_the_summary(tmp_path: Path, ray_session: None, call_job: Callable[..., JobRun]) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    ended = call_job("verify", tmp_path / "data", "--redraw", 7)
    assert ended.returncode == 0, ended.stderr
    assert ended.summary is not None and ended.summary["ok"]
    assert (ended.summary["redraw"]["redrawn"], ended.summary["redraw"]["identical"]) == (7, 7)
    ended = call_job("verify", view_of(tmp_path / "view", [tmp_path / "data"], [(0, 3), (0, 9)]), "--redraw", 7)
    assert ended.returncode == 0 and ended.summary is not None, ended.stderr
    assert (ended.summary["stored"], ended.summary["redraw"]["identical"]) == (2, 2)


def test_a_wait_for_what_another_job_has_is_said(
    tmp_path: Path, ray_session: None, call_job: Callable[..., JobRun]
) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    with all_cpus_held_until("waiting for") as said:
        ended = call_job("verify", tmp_path / "data", "--redraw", 7)
    assert ended.returncode == 0, ended.stderr
    assert "CPUs and 0 GPUs; the cluster has 2 and 0 now, of which 0 and 0 are free" in said[0]
