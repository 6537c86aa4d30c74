"""The state of a dataset: that of a derived one is its rows, whichever machine made them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import open_dataset
from cluster.dataset.state import state_digest
from cluster.dataset.verify import verify
from cluster.dataset.view import ViewRows, write_view
from cluster.store.store import open_store
from cluster.training.data.mixture import open_training_sets
from cluster.training.request import DataSource
from tests.helpers.tiny_dataset import write_dataset

HERE, THERE = (
    {"versions": {"torch": torch}, "environments": ({"versions": {"torch": torch}, "processor": processor},)}
    for torch, processor in (("2.9.1", "here"), ("2.10.0", "there"))
)


@pytest.fixture
def data(tmp_path: Path, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path / "data", tiny_clip, rows=12, shard_size=5)


def derived(
    out: Path, data: Path, made_by: Mapping[str, Any] | None, *, materialise: bool = False, word: str = "caption"
) -> str:
    """Five rows of a dataset, made anew at `out`; their state, the same wherever it is asked for."""
    shutil.rmtree(out, ignore_errors=True)
    source, none = open_dataset(open_store(data)), np.zeros(5, np.int64)
    rows = ViewRows(
        sample_id=[f"{number:09d}-00" for number in range(5)],
        caption=[f"A {word} number {number}." for number in range(5)],
        clip_score=np.full(5, 0.3, np.float32),
        source=none,
        shard=none,
        row=np.arange(5),
    )
    lineage = Lineage(method="test", settings={}, sources=(lineage_source(source),), rows_in=12)
    write_view(open_store(out), [source], rows, lineage, materialise=materialise, made_by=made_by)
    (training_set,) = open_training_sets([DataSource(str(out))])
    state = open_dataset(open_store(out)).sha256
    assert training_set.description()["sha256"] == state
    return state


@pytest.mark.parametrize("materialise", [False, True])
def test_the_same_rows_made_on_another_machine_are_the_same_state(
    tmp_path: Path, data: Path, materialise: bool
) -> None:
    out = tmp_path / "out"
    earlier = derived(out, data, None, materialise=materialise)
    assert earlier == hashlib.sha256((out / MANIFEST_KEY).read_bytes()).hexdigest(), "as earlier releases recorded it"
    documents = set()
    for made_by in (HERE, THERE):
        assert derived(out, data, made_by, materialise=materialise) == earlier
        documents.add((out / MANIFEST_KEY).read_bytes())
    assert len(documents) == 2 and load_manifest(open_store(out)).environments == THERE["environments"]
    assert derived(out, data, HERE, materialise=materialise, word="changed caption") != earlier


def test_a_view_of_a_view_that_was_made_again_elsewhere_goes_on(tmp_path: Path, data: Path) -> None:
    derived(tmp_path / "first", data, HERE)
    second = CurateRequest(data=(str(tmp_path / "first"),), out=str(tmp_path / "second"), min_words=2)
    before = curate(second)
    (tmp_path / "second" / MANIFEST_KEY).unlink()  # as if it had been killed
    derived(tmp_path / "first", data, THERE)
    assert curate(second)["fingerprint"] == before["fingerprint"]


def test_pictures_that_were_written_out_again_elsewhere_are_found_beside_a_view(tmp_path: Path, data: Path) -> None:
    world, after = tmp_path / "before", tmp_path / "after"
    derived(world / "pictures", data, HERE, materialise=True)
    curate(CurateRequest(data=(str(world / "pictures"),), out=str(world / "view"), min_words=2))
    shutil.copytree(world, after)
    derived(after / "pictures", data, THERE, materialise=True)
    assert [each.path for each in load_manifest(open_store(after / "view")).pictures] == [str(after / "pictures")]
    assert verify(open_store(after / "view"))["ok"]


def test_a_shard_that_has_changed_is_another_state_and_verify_says_so(tmp_path: Path, data: Path) -> None:
    before = derived(tmp_path / "pictures", data, HERE, materialise=True)
    curate(CurateRequest(data=(str(tmp_path / "pictures"),), out=str(tmp_path / "view"), min_words=2))
    assert derived(tmp_path / "pictures", data, HERE, materialise=True, word="changed caption") != before
    found = verify(open_store(tmp_path / "view"))
    assert not found["ok"] and "have changed" in found["problems"][0]


def test_where_a_dataset_was_drawn_is_a_part_of_its_state(data: Path) -> None:
    drawn = (data / MANIFEST_KEY).read_bytes()
    elsewhere = json.dumps(json.loads(drawn) | {"versions": {"torch": "2.10.0"}}).encode()
    assert state_digest(drawn) == hashlib.sha256(drawn).hexdigest()
    assert state_digest(elsewhere) == hashlib.sha256(elsewhere).hexdigest()


@pytest.mark.parametrize("damaged", [b"{", b"", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_document_has_a_digest_too(damaged: bytes) -> None:
    assert state_digest(damaged) == hashlib.sha256(damaged).hexdigest()
