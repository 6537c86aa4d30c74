"""SynC over a dataset on a store: equal to SynC in memory, whatever the blocks; resumed, nothing is done twice."""

import dataclasses
import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.curation.sync import cells, stages, vectors
from cluster.curation.sync.choice import refine_in_memory
from cluster.curation.sync.nearest import nearest
from cluster.curation.sync.objects import read_arrays
from cluster.curation.sync.sentences import SentenceSpec
from cluster.curation.sync.settings import WORK, SyncSettings
from cluster.curation.sync.stages import Recall, Refined, refine_pairs, work_folder
from cluster.curation.sync.vectors import Captions, groups_of, read_array, unit
from cluster.curation.tasks import InThisProcess
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.read import read_dataset
from cluster.store.store import Store, open_store
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.model_faults import OutOfMemory
from tests.helpers.tiny_dataset import write_dataset

SETTINGS = SyncSettings(candidates=7, captions_per_picture=3, keep=0.8)
PROBING = dataclasses.replace(SETTINGS, probes=2)
OF_CLIP = SentenceSpec(model="clip")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """90 pairs in 9 shards; of 60 possible captions some occur often."""
    return write_dataset(tmp_path_factory.mktemp("data") / "drawn", tiny_clip, rows=90, shard_size=10)


def refined(
    dataset: Path,
    out: Path,
    *,
    block_size: int = 4096,
    settings: SyncSettings = SETTINGS,
    tasks: InThisProcess = InThisProcess(),  # noqa: B008
) -> Refined:
    store = open_store(dataset)
    manifest = load_manifest(store)
    digest = hashlib.sha256(store.read_bytes(MANIFEST_KEY)).hexdigest()
    return refine_pairs(
        store, manifest, open_store(out), work_folder(digest, manifest, OF_CLIP, "cpu"), settings, OF_CLIP,
        tasks, clip=manifest.spec.clip.model, block_size=block_size, device="cpu",
    )  # fmt: skip


def assert_same(one: Refined, other: Refined) -> None:
    for name in Refined.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_dataset_is_refined_as_in_memory(dataset: Path, tiny_clip: Path, tmp_path: Path) -> None:
    rows = list(read_dataset(dataset, columns=("caption", "global_feature")))
    captions = unit(ClipEncoder(str(tiny_clip)).encode_texts([row.caption for row in rows]))
    assert len({row.caption for row in rows}) < len(rows), "captions must repeat here"
    choice, kept = refine_in_memory(captions, unit(np.stack([row.global_feature for row in rows])), captions, SETTINGS)
    found = refined(dataset, tmp_path)
    np.testing.assert_array_equal(found.picture, choice.picture)
    np.testing.assert_array_equal(found.score, choice.score)
    np.testing.assert_array_equal(found.kept, kept)
    np.testing.assert_allclose(found.cosine, choice.cosine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [SETTINGS, PROBING], ids=["exact", "probing"])
@pytest.mark.parametrize("block_size", [1, 13])
def test_blocks_and_groups_change_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int, settings: SyncSettings
) -> None:
    whole = refined(dataset, tmp_path / "whole", settings=settings)
    monkeypatch.setattr(vectors, "GROUP_ROWS", 25)
    assert len(groups_of(load_manifest(open_store(dataset)))) == 5
    assert_same(refined(dataset, tmp_path / "blocks", block_size=block_size, settings=settings), whole)


def test_as_many_probes_as_cells_refine_exactly(dataset: Path, tmp_path: Path) -> None:
    """90 pictures have 16 cells."""
    exact = refined(dataset, tmp_path)
    found = refined(dataset, tmp_path, settings=dataclasses.replace(SETTINGS, probes=16))
    assert exact.recall is None and found.recall == Recall(candidates=1, describers=1)
    assert_same(dataclasses.replace(found, recall=None), exact)


def test_recall_is_the_share_of_the_exact_nearest_that_probes_find(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all queries; of a sample it is near that."""
    settings = dataclasses.replace(SETTINGS, probes=1)
    found = refined(dataset, tmp_path, block_size=40, settings=settings)
    work = open_store(tmp_path / f"{WORK}").list()[0].split("/")[0]
    store = open_store(tmp_path / WORK / work)
    pictures, captions = (
        np.concatenate([read_array(store, key) for key in store.list(f"{kind}/")]) for kind in ("pictures", "captions")
    )
    shares = []
    for name, queries, those, k in (
        ("candidates-7", captions, pictures, 7),
        ("describers-3", pictures, captions, 3),
    ):
        given = np.concatenate([read_arrays(store, key)["indices"] for key in store.list(f"{name}-probes-1/")])
        exact = nearest(queries, [those], k).indices
        hits = [len(set(one) & set(other)) for one, other in zip(exact.tolist(), given.tolist(), strict=True)]
        shares.append(sum(hits) / exact.size)
    assert found.recall == Recall(*(pytest.approx(share) for share in shares))
    assert all(0.3 < share < 1 for share in shares), "something is to be found, and lost"
    monkeypatch.setattr(stages, "RECALL_QUERIES", 30)
    sampled = refined(dataset, tmp_path / "sampled", settings=settings).recall
    assert sampled == Recall(*(pytest.approx(share, abs=0.2) for share in shares)) and sampled != found.recall


def test_an_exact_run_takes_nothing_of_one_with_probes_and_has_the_keys_it_had(dataset: Path, tmp_path: Path) -> None:
    refined(dataset, tmp_path / "both", settings=PROBING)
    assert_same(refined(dataset, tmp_path / "both"), refined(dataset, tmp_path / "exact"))
    folders = {key.split("/")[2] for key in open_store(tmp_path / "exact").list(f"{WORK}/")}
    assert folders == {"rows", "pictures", "captions", "candidates-7", "describers-3", "choices-7-3"}


@pytest.mark.parametrize("settings", [SETTINGS, PROBING], ids=["exact", "probing"])
def test_an_interrupted_run_goes_on_where_it_was(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: SyncSettings
) -> None:
    """However many objects were written, the rest is done, and nothing of it twice."""
    monkeypatch.setattr(cells, "PIECE_ROWS", 20)
    monkeypatch.setattr(cells, "PIECES_AT_ONCE", 2)
    whole = refined(dataset, tmp_path / "whole", block_size=30, settings=settings)
    total = len(open_store(tmp_path / "whole").list())
    write = Store.write_bytes
    for stop in range(0, total, 3):
        out = tmp_path / f"stopped-{stop}"
        written: list[str] = []

        def put(store: Store, key: str, data: bytes, *, stop: int = stop, written: list[str] = written) -> None:
            if len(written) == stop:
                raise KeyboardInterrupt
            write(store, key, data)
            written.append(key)

        with monkeypatch.context() as patched:
            patched.setattr(Store, "write_bytes", put)
            with pytest.raises(KeyboardInterrupt):
                refined(dataset, out, block_size=30, settings=settings)
            first = written[:]
            patched.setattr(Store, "write_bytes", lambda *given, w=written: (write(*given), w.append(given[1])))
            assert_same(refined(dataset, out, block_size=30, settings=settings), whole)
        twice = set(first) & set(written[len(first) :])
        of_several = ("/pictures/0", "/sentences/0", "/sorted/")
        assert all(any(kind in key for kind in of_several) for key in twice), "half of what a task makes"
        assert sorted(set(written)) == open_store(out).list()


def test_other_settings_use_the_same_vectors_and_no_other_block(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refined(dataset, tmp_path)
    caplog.set_level(logging.INFO)
    other = SyncSettings(candidates=3, captions_per_picture=3)
    assert_same(refined(dataset, tmp_path, settings=other), refined(dataset, tmp_path / "anew", settings=other))
    said = [record.getMessage() for record in caplog.records if record.name == "cluster.curation.tasks"]
    assert said[:2] == ["candidates: 1 pieces", "choices: 1 pieces"]


class Watched(InThisProcess):
    """Only what is called with a device asks for a GPU."""

    def __init__(self) -> None:
        self.on_device: dict[str, bool] = {}

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str, on_device: bool = False) -> None:
        assert on_device == ("device" in inspect.signature(function).parameters), what
        self.on_device[what] = on_device
        super().run(function, calls, what=what, on_device=on_device)


def test_stages_that_compute_on_processors_reserve_no_gpu(dataset: Path, tmp_path: Path) -> None:
    tasks = Watched()
    refined(dataset, tmp_path, settings=PROBING, tasks=tasks)
    without = {what for what, on_device in tasks.on_device.items() if not on_device}
    assert without == {"picture vectors", "pictures by cell", "captions by cell", "choices"}
    assert {"caption vectors", "candidates", "describers"} <= tasks.on_device.keys()


def test_features_that_are_no_direction_are_refused_by_name(dataset: Path, tiny_clip: Path, tmp_path: Path) -> None:
    found = open_store(write_dataset(tmp_path / "zero", tiny_clip, rows=4, zero_row=2))
    with pytest.raises(InputError, match=r"part-000000.parquet: the features of 000000002-00 are zero or not finite"):
        refined(Path(found.prefix), tmp_path / "out")


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("cluster.curation.sync.nearest._looked_through", "give a smaller --block-size"),
        ("pcm.clip.encoder.ClipEncoder.encode_texts", "give --device cpu"),
    ],
)
def test_a_device_that_is_too_small_is_said_in_one_line(
    place: str, advice: str, probes: int | None, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(place, full)
    with pytest.raises(OutOfMemory, match=rf"^out of memory \(CUDA .*\) while .*; .*{advice}"):
        refined(dataset, tmp_path, settings=dataclasses.replace(SETTINGS, probes=probes))


def test_a_damaged_object_is_named(dataset: Path, tmp_path: Path) -> None:
    refined(dataset, tmp_path)
    store = open_store(tmp_path)
    block = next(key for key in store.list() if "/choices-" in key)
    store.write_bytes(block, store.read_bytes(block)[:-9])
    with pytest.raises(InputError, match=f"{block}: damaged; delete it"):
        refined(dataset, tmp_path)


def test_an_object_that_is_deleted_is_made_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one of each kind, also where a task makes several."""
    monkeypatch.setattr(vectors, "GROUP_ROWS", 50)
    monkeypatch.setattr(cells, "PIECE_ROWS", 20)
    whole = refined(dataset, tmp_path, settings=PROBING)
    store = open_store(tmp_path)
    objects = {key: store.read_bytes(key) for key in store.list(f"{WORK}/")}
    of_kinds = {key.rsplit("/", 1)[0]: key for key in sorted(objects, reverse=True)}
    assert len(of_kinds) == 13
    for key in of_kinds.values():
        store.delete(key)
        assert_same(refined(dataset, tmp_path, settings=PROBING), whole)
    assert {key: store.read_bytes(key) for key in store.list(f"{WORK}/")} == objects


def test_captions_are_numbered_as_they_come() -> None:
    digests = np.array([b"c", b"a", b"c", b"b", b"a", b"c"], "V1")
    captions = Captions.of(digests, most=2)
    assert captions.of_row.tolist() == [0, 1, 0, 2, 1, 0]
    assert captions.first_row.tolist() == [0, 1, 3]
    assert captions.members.tolist() == [[0, 2], [1, 4], [3, -1]]


def test_the_work_of_other_data_or_encoders_lies_elsewhere(dataset: Path) -> None:
    manifest = load_manifest(open_store(dataset))
    folders = {
        work_folder("1" * 64, manifest, OF_CLIP, "cpu"),
        work_folder("2" * 64, manifest, OF_CLIP, "cpu"),
        work_folder("1" * 64, manifest, OF_CLIP, "cuda"),
        work_folder("1" * 64, manifest, SentenceSpec(model="x", revision="a" * 40), "cpu"),
    }
    assert len(folders) == 4 and all(folder.startswith(f"{WORK}/") for folder in folders)
