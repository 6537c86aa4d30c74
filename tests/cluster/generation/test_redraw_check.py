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

from cluster.dataset.layout import MANIFEST_KEY, load_manifest, parquet_bytes
from cluster.dataset.request import VerifyRequest
from cluster.generation import environment
from cluster.generation.environment import differences, joined_versions
from cluster.generation.redraw_check import (
    Again,
    batches,
    chosen_rows,
    compare,
    draw_again,
    pixel_difference,
    planned,
)
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.images import encode_image
from tests.helpers.job_runs import JobRun
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, tiny_spec, write_corpus


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset_in_process(folder / "drawn", write_corpus(folder), tiny_spec(tiny_t2i), shard_size=5)
    return folder / "drawn"


def again(data: Path, *, count: int = 10, seed: int = 0) -> dict:
    store = open_store(data)
    plan = planned(store)
    work = list(batches(plan.spec, chosen_rows(store, plan, count=count, seed=seed)))
    return compare(store, [rows for _, rows in work], [draw_again(store, spec, rows) for spec, rows in work])


def test_all_are_identical_where_they_were_drawn(drawn: Path) -> None:
    found = again(drawn)
    assert (found["redrawn"], found["identical"], found["failed"]) == (10, 10, 0)
    assert found["environment_differs"] == [] and found["ok"]


def test_the_choice_follows_from_the_seed(drawn: Path) -> None:
    store = open_store(drawn)
    plan = planned(store)

    def ids(seed: int) -> list[str]:
        return chosen_rows(store, plan, count=10, seed=seed)["sample_id"].to_pylist()

    assert ids(1) == ids(1) and ids(1) != ids(2) and len(ids(1)) == 10
    assert len(chosen_rows(store, plan, count=999, seed=0)) == 24


def with_other_picture(data: Path, out: Path) -> Store:
    """A copy of a dataset in whose first shard the first picture is another, with the manifest saying so."""
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


def test_another_environment_is_said_and_explains_the_difference(drawn: Path, tmp_path: Path) -> None:
    store = with_other_picture(drawn, tmp_path / "other")
    document = json.loads(store.read_bytes(MANIFEST_KEY))
    document["environments"][0]["versions"]["torch"] = "1.0"
    store.write_bytes(MANIFEST_KEY, json.dumps(document).encode())
    found = again(tmp_path / "other", count=24)
    assert found["ok"] and len(found["environment_differs"]) == 1
    assert found["environment_differs"][0].startswith("torch: 1.0 -> ")


def test_pixels_are_compared_in_levels() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    other = pixels.copy()
    other[0, 0, 0] = 148

    def png(values: np.ndarray) -> bytes:
        return encode_image(values, image_format="png", quality=95)

    assert pixel_difference(Again("a", png(pixels), png(other))) == (48, 1.0)
    assert pixel_difference(Again("a", png(pixels), png(pixels[:2]))) is None


def test_a_picture_is_drawn_with_the_attempt_and_the_batch_that_made_it(drawn: Path, tmp_path: Path) -> None:
    """Rows that say they were drawn in smaller batches are drawn in these, apart from the others."""
    store = open_store(drawn)
    chosen = chosen_rows(store, planned(store), count=8, seed=0)
    sizes = pa.array([4, 4, 2, 4, 2, 4, 4, 4], pa.int32())
    chosen = chosen.set_column(chosen.column_names.index("batch_size"), "batch_size", sizes)
    work = list(batches(planned(store).spec, chosen))
    assert [(spec.generator.batch_size, len(rows)) for spec, rows in work] == [(2, 2), (4, 6)]
    assert all(spec.generator.max_attempts == 1 for spec, _ in work)


def test_the_manifest_says_where_it_was_drawn_and_by_what(drawn: Path) -> None:
    manifest = load_manifest(open_store(drawn))
    (found,) = manifest.environments
    assert found == environment.environment(device="cpu", loads_models=True)
    assert {"pcmnet-ray", "torch", "diffusers", "transformers", "open_clip_torch", "pillow"} <= manifest.versions.keys()
    assert found["instructions"] and found["processor"] and found["gpu"] is None


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


def test_on_ray_and_in_the_summary(tmp_path: Path, ray_session: None, call_job: Callable[..., JobRun]) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    ended = call_job("verify", tmp_path / "data", "--redraw", 7)
    assert ended.returncode == 0, ended.stderr
    assert ended.summary is not None and ended.summary["ok"]
    assert (ended.summary["redraw"]["redrawn"], ended.summary["redraw"]["identical"]) == (7, 7)
