"""jobs.report on small real datasets and runs: what it shows, what it reads, and what it refuses."""

import base64
import dataclasses
import io
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, stats_key
from cluster.dataset.state import state_digest
from cluster.evaluation.evaluate import EVALUATION_KEY
from cluster.evaluation.experiments import comparison
from cluster.evaluation.request import EvaluateRequest
from cluster.report import dataset_facts
from cluster.report.gallery import make_gallery
from cluster.report.headline import headline
from cluster.report.make import gather, make_report
from cluster.report.request import ReportRequest
from cluster.report.run_facts import _steps
from cluster.store.object_file import ObjectFile
from cluster.store.store import Store, open_store, read_uri
from cluster.sweep.results import TrialResult
from cluster.sweep.sweep import SWEEP_KEY
from cluster.sweep.trial import RESULT_FILE, TRIALS, trial_id
from cluster.training.config import preset
from cluster.training.reporting import METRICS_KEY, LossLog
from cluster.training.run_document import CONFIG_KEY
from pcm.errors import InputError
from tests.helpers.page_reader import Page
from tests.helpers.seaweedfs import S3Server
from tests.helpers.tiny_dataset import TINY, pictures_of, write_checkpoint, write_dataset, write_pictures
from tests.helpers.tiny_generation import make_dataset_in_process, tiny_spec

SCRIPT = "<script>document.title='broken in'</script> a dog"
#: The third cannot be used; the fourth is written from right to left.
CAPTIONS = (
    SCRIPT, 'A "cat" & a dog </style> on a table.', "   ", "כלב על החוף", "A dog near the beach.", "Two dogs on snow.",
    "A cow in the street.", "A horse; it's <b>bold</b>.",
)  # fmt: skip
EPOCHS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_t2i: Path) -> Path:
    """data/ (drawn), scenes/ (without plan or statistics), run/, evaluation/, sweep/, pictures/, references.csv."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "captions.jsonl").write_text("".join(json.dumps({"caption": each}) + "\n" for each in CAPTIONS))
    make_dataset_in_process(folder / "data", folder / "captions.jsonl", tiny_spec(tiny_t2i, tiny_clip), shard_size=3)
    write_dataset(folder / "scenes", tiny_clip, rows=60)
    write_pictures(folder / "pictures", count=5)
    (folder / "pictures" / "scene1003.png").write_bytes(b"broken")
    write_run(folder / "run", folder / "scenes")
    write_sweep(folder / "sweep")
    write_evaluation(folder / "evaluation", folder)
    return folder


def write_run(folder: Path, data: Path) -> None:
    """A run as jobs.train leaves it; the network is untrained, the numbers are written by hand."""
    write_checkpoint(folder / "best", data)
    store, config = open_store(str(folder)), preset("embedded").with_overrides(TINY | {"epochs": EPOCHS + 1})
    clip = load_manifest(open_store(data)).spec.clip.model
    document = {
        "train": config.to_dict(),
        "clip": {"model": clip, "dtype": "float32"},
        "clip_option": clip,
        "datasets": [{"path": str(data), "sha256": "0" * 64, "weight": 0.5}],
        "validation": None,
        "versions": {"torch": "2"},
    }
    store.write_bytes(CONFIG_KEY, json.dumps(document).encode())
    for epoch in range(1, EPOCHS + 1):
        log = LossLog(store, epoch=epoch, until=0)
        for step in range(500 * epoch - 499, 500 * epoch + 1):
            log.append(step=step, loss=3 / step, lr=1e-4 * step)
        log.write(at_end=True)
    rows = [
        {"epoch": epoch, "step": 500 * epoch, "loss": 1 / epoch, "lr": 1e-4, "CIDEr": cider, "seconds": 2.0,
         "validation_seconds": 0.5, "samples_per_second": 30.0}
        for epoch, cider in zip(range(1, EPOCHS + 1), (0.2, 0.625, 0.5), strict=True)
    ]  # fmt: skip
    store.write_bytes(METRICS_KEY, "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_a_run_of_many_steps_is_read_in_little_memory(tmp_path: Path) -> None:
    """A run of a week has millions of steps: as rows they took 600 bytes each."""
    store, steps = open_store(tmp_path), 20_000
    log = LossLog(store, epoch=1, until=0)
    for step in range(1, steps + 1):
        log.append(step=step, loss=3 / step, lr=1e-4 * step)
    log.write(at_end=True)
    file = store.size("losses/epoch-001.jsonl")
    tracemalloc.start()
    try:
        found = _steps(store, "losses/epoch-001.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * file + 100 * steps
    assert found.tolist() == [[step, 3 / step, 1e-4 * step] for step in range(1, steps + 1)]


def write_evaluation(folder: Path, world: Path) -> None:
    metrics = {
        "CIDEr": 1.25,
        "CIDEr_shuffled": 0.125,
        "Bleu_4": 0.375,
        "SPICE": None,
        "n": 5,
        "reasons": {"SPICE": "?"},
    }
    request = EvaluateRequest(**pictures_of(world), checkpoint=str(world / "run"), experiment="coco_b32")
    asked = {**dataclasses.asdict(request), "pictures": dataclasses.asdict(request.pictures)}
    document = {"metrics": metrics | {"paper": comparison("coco_b32", metrics)}, "request": asked}
    open_store(str(folder)).write_bytes(EVALUATION_KEY, json.dumps(document).encode())


def write_sweep(folder: Path) -> None:
    store = open_store(str(folder))
    document = {
        "params": {"top_concepts": "1,3", "lr_factor": "log:0.1:9"},
        "search": "grid",
        "run": {"train": preset("embedded").to_dict()},
    }
    store.write_bytes(SWEEP_KEY, json.dumps(document).encode())
    scores = {(1, 0.1): 0.3, (3, 0.1): 0.9, (1, 5.0): 0.7, (3, 5.0): None}
    for number, ((top_concepts, lr_factor), cider) in enumerate(scores.items()):
        trial = TrialResult(
            overrides={"top_concepts": top_concepts, "lr_factor": lr_factor, "seed": number},
            status="finished" if cider else "failed",
            reason="" if cider else "loss is <nan>",
            history=tuple({"epoch": epoch, "CIDEr": cider * epoch / 2} for epoch in (1, 2)) if cider else (),
            seconds=1.5,
        )
        name = f"{TRIALS}/{trial_id(trial.overrides)}/{RESULT_FILE}"
        store.write_bytes(name, json.dumps(dataclasses.asdict(trial)).encode())


#: Changes of `everything` that leave the pictures, or the dataset, out: with what would have no effect then.
NO_PICTURES = {"images": None, "references": None, "device": "auto"}
NO_DATA = {"data": None, "price_per_hour": None}


def everything(world: Path, out: Path, **changes) -> ReportRequest:
    request = ReportRequest(
        out=str(out), data=str(world / "data"), run=str(world / "run"), evaluation=str(world / "evaluation"),
        sweep=str(world / "sweep"), **pictures_of(world), price_per_hour=3.5, device="cpu",
    )  # fmt: skip
    return replace(request, **changes)


@pytest.fixture(scope="module")
def whole(world: Path) -> Page:
    made = make_report(everything(world, world / "report.html"))
    assert made["ok"] and made["path"] == str(world / "report.html")
    document = (world / "report.html").read_bytes()
    assert len(document) == made["bytes"] < 1_000_000
    return Page(document.decode())


def part(page: Page, world: Path, name: str) -> Page:
    """One section of the report of everything."""
    document = (world / "report.html").read_text()
    found = re.search(rf'<section id="{name}".*?</section>|<section[^>]*id="{name}".*?</section>', document, re.S)
    assert found, name
    return Page(found[0])


def test_a_caption_is_text_whatever_it_says(whole: Page, world: Path) -> None:
    assert SCRIPT in whole.text and "it's <b>bold</b>" in whole.text and "</style> on a table" in whole.text
    assert len(whole.all("script")) == 1 and len(whole.all("style")) == 1
    document = (world / "report.html").read_text()
    assert "<script>document" not in document and document.count("</style>") == 1
    assert "כלב על החוף" in whole.text


def test_the_page_loads_nothing_and_no_other_script_may_run(whole: Page) -> None:
    for found in whole.attributes:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = found.get(name) or "#"
            assert value.startswith(("#", "data:image/webp;base64,")), value
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(whole.names)
    policy = next(str(found["content"]) for found in whole.all("meta") if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; ") and "script-src 'sha256-" in policy
    assert not any(name.startswith("on") for found in whole.attributes for name in found)


def test_pictures_stand_with_caption_seed_and_score(whole: Page, world: Path) -> None:
    shown = part(whole, world, "pictures")
    assert all(found.get("alt") for found in shown.all("img"))
    facts = gather(ReportRequest(out="unused", data=str(world / "data"))).data
    assert facts is not None and len(facts.rows) == len(CAPTIONS) - 1
    for row in facts.rows:
        assert f"seed {row.seed}" in shown.text and f"{row.clip_score:.3f}" in shown.text
    picture = str(shown.all("img")[0]["src"]).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (32, 32)
    redraw = {found["data-redraw"] for found in shown.all("figure")}
    assert f"python -m jobs.generate --out {world / 'data'} --only 000000000-00" in redraw


def test_best_come_first_and_worst_last(world: Path) -> None:
    found = gather(ReportRequest(out="unused", data=str(world / "scenes")))
    assert found.data is not None and found.gallery is not None
    scores = sorted((row.clip_score for row in found.data.rows), reverse=True)
    assert [each.row.clip_score for each in found.gallery.best] == scores[:12]
    assert [each.row.clip_score for each in found.gallery.worst] == scores[:-13:-1]
    assert {each.name for each in found.gallery.concepts} == {"circle", "ground", "bar"}
    circle = next(each for each in found.gallery.concepts if each.name == "circle")
    holding = [row.clip_score for row in found.data.rows if "circle" in row.caption]
    assert circle.captions == len(holding) and circle.mean_score == pytest.approx(sum(holding) / len(holding))
    shown = [each.row.clip_score for each in circle.pictures]
    assert all("circle" in each.row.caption for each in circle.pictures)
    assert shown == sorted(shown, reverse=True) and (shown[0], shown[-1]) == (max(holding), min(holding))


def test_what_was_refused_is_counted_by_reason_with_examples(whole: Page, world: Path) -> None:
    shown = part(whole, world, "quarantine")
    assert "1 of 8 samples" in shown.text and "empty" in shown.text and "000000002-00" in shown.text


def test_the_dataset_is_verified_and_its_fingerprint_shown(whole: Page, world: Path) -> None:
    from cluster.dataset.verify import verify

    shown = part(whole, world, "dataset")
    assert verify(open_store(world / "data"))["fingerprint"] in shown.text
    assert "8 expected = 7 stored + 1 quarantined" in shown.text


def test_a_damaged_dataset_is_said_to_be_damaged(world: Path, tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> None:
    store, _, _ = make_dataset_in_process(
        tmp_path / "data", world / "captions.jsonl", tiny_spec(tiny_t2i, tiny_clip), shard_size=3
    )
    (tmp_path / "data" / stats_key(1)).unlink()
    make_report(ReportRequest(out=str(tmp_path / "r.html"), data=store.root))
    assert "corrupt" in Page((tmp_path / "r.html").read_text()).text


def test_time_and_cost_come_from_the_shards_statistics(whole: Page, world: Path) -> None:
    store = open_store(world / "data")
    stats = [json.loads(store.read_bytes(stats_key(shard))) for shard in range(3)]
    shown = part(whole, world, "speed")
    hours = (max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)) / 3600
    assert "at 3.5 an hour" in shown.text and "Cost so far" in shown.text
    found = gather(ReportRequest(out="unused", data=str(world / "data"))).speed
    assert found is not None and found.machine_hours[-1] == pytest.approx(hours, rel=0.05)


def test_training_is_shown_by_epoch_with_its_best(whole: Page, world: Path) -> None:
    shown = part(whole, world, "training")
    assert "3 of 4 epochs, 1,500 steps; the best is epoch 2, with CIDEr 62.5" in shown.text
    assert len(shown.all("svg")) == 4 and "nearest preset embedded" in shown.text
    assert "hidden_size 32" in shown.text and "vocab_size 1" not in shown.text.partition("Every epoch")[0]
    run = gather(everything(world, world / "unused.html", **NO_DATA, **NO_PICTURES)).run
    assert run is not None and run.loss.shape == (300, 2) and run.loss[0, 1] > run.loss[-1, 1]


def test_metrics_stand_beside_the_papers_where_an_experiment_applies(whole: Page, world: Path, tmp_path: Path) -> None:
    shown = part(whole, world, "metrics").text
    assert all(said in shown for said in ("125.0", "103.8", "37.5", "31.5", "12.5", "coco_b32", "not available"))
    plain, document = tmp_path / "evaluation", json.loads((world / "evaluation" / EVALUATION_KEY).read_text())
    del document["metrics"]["paper"]
    plain.mkdir()
    (plain / EVALUATION_KEY).write_text(json.dumps(document))
    make_report(ReportRequest(out=str(tmp_path / "r.html"), evaluation=str(plain)))
    text = Page((tmp_path / "r.html").read_text()).text
    assert "No experiment of the paper" in text and "103.8" not in text


def evaluation_page(folder: Path, tmp_path: Path) -> str:
    make_report(ReportRequest(out=str(tmp_path / "r.html"), evaluation=str(folder)))
    return Page((tmp_path / "r.html").read_text()).text


def test_metrics_are_said_to_be_of_what_was_scored(world: Path, tmp_path: Path) -> None:
    document = json.loads((world / "evaluation" / EVALUATION_KEY).read_text())
    document["metrics"]["domains"] = {"in-domain": {"CIDEr": None, "n": 1}, "near-domain": {"CIDEr": 0.875, "n": 4}}
    (tmp_path / EVALUATION_KEY).write_text(json.dumps(document))
    text = evaluation_page(tmp_path, tmp_path)
    assert "87.5 (4)" in text and "in-domain" not in text and "beam search 3" in text
    document["request"] |= {"results": "theirs.json"}
    document["metrics"]["domains"] = {"in-domain": {"CIDEr": None, "n": 1}}
    (tmp_path / EVALUATION_KEY).write_text(json.dumps(document))
    text = evaluation_page(tmp_path, tmp_path)
    assert "on 5 captions of theirs.json." in text and "beam search" not in text and "by domain" not in text


def test_of_an_evaluation_of_every_epoch_the_best_is_shown(world: Path, tmp_path: Path) -> None:
    for epoch, cider in ((1, 0.5), (3, 0.75)):
        document = json.loads((world / "evaluation" / EVALUATION_KEY).read_text())
        document["metrics"]["CIDEr"] = cider
        open_store(tmp_path / f"epoch-{epoch:03d}").write_bytes(EVALUATION_KEY, json.dumps(document).encode())
    (tmp_path / "epochs.json").write_text(json.dumps({"metrics": {"best": {"epoch": 3}}}))
    assert "The best epoch by CIDEr is 3. CIDEr 75.0 on 5 pictures" in evaluation_page(tmp_path, tmp_path)
    (tmp_path / "epochs.json").write_text(json.dumps({"metrics": {"best": None}}))
    with pytest.raises(InputError, match=r"epochs\.json: damaged"):
        evaluation_page(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("key", "line", "said"),
    [
        ("config.json", '{"train": {}}', "config.json: damaged (KeyError: 'clip')"),
        ("config.json", "{", "config.json: damaged"),
        ("metrics.jsonl", '{"epoch": 1, "step": 2', "metrics.jsonl: damaged"),
        ("metrics.jsonl", '{"epoch": 1, "step": 2, "loss": 1, "lr": 1}', "metrics.jsonl: damaged (KeyError: 'CIDEr')"),
        ("metrics.jsonl", "7", "metrics.jsonl: damaged"),
        ("losses/epoch-002.jsonl", '{"step": 1, "loss": 2.0}', "losses/epoch-002.jsonl: damaged (KeyError: 'lr')"),
        ("losses/epoch-002.jsonl", '{"step": 1, "loss": "x"}', "losses/epoch-002.jsonl: damaged (loss is 'x')"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(world: Path, tmp_path: Path, key: str, line: str, said: str) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / key).write_text(line + "\n")
    with pytest.raises(InputError, match=re.escape(said)):
        gather(ReportRequest(out="unused", run=str(tmp_path / "run")))


@pytest.mark.parametrize("model", ["photos", "imported"])
def test_pictures_that_were_not_drawn_are_not_said_to_be(world: Path, tmp_path: Path, model: str) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / MANIFEST_KEY).read_text())
    manifest["spec"]["generator"] |= {"model": model, "num_inference_steps": 1}
    (tmp_path / "data" / MANIFEST_KEY).write_text(json.dumps(manifest))
    (tmp_path / "data" / PLAN_KEY).unlink()  # which is of another specification now
    make_report(ReportRequest(out=str(tmp_path / "r.html"), data=str(tmp_path / "data")))
    text = Page((tmp_path / "r.html").read_text()).text
    assert "7 of 8 pairs of a picture and a caption are stored; the pictures were not drawn here." in text
    assert f"{model}: nothing was drawn by jobs." in text
    assert not any(said in text for said in ("drawn by photos", "can be drawn again", "1 steps", "while drawing"))


def test_captions_of_real_pictures_stand_with_concepts_and_patches(whole: Page, world: Path) -> None:
    shown = part(whole, world, "captions")
    found = gather(everything(world, world / "unused.html", **NO_DATA)).captions
    assert found is not None and len(found.pictures) == 4 and (found.rows, found.columns) == (4, 4)
    assert "1 pictures could not be read" in shown.text and "scene1003.png" in shown.text
    overlays = [found for found in shown.all("svg") if found.get("class") == "patches"]
    assert [overlay["viewbox"] for overlay in overlays] == ["0 0 4 4"] * 4
    assert len(shown.all("rect")) == sum(len(picture.patches) for picture in found.pictures) >= 4
    for picture in found.pictures:
        assert picture.caption.removesuffix(" .") in shown.text and picture.references[0] in shown.text
        assert len(picture.concepts) == 5 and all(name in shown.text for name, _, _ in picture.concepts)
        assert all(0 <= patch.row < 4 and 0 <= patch.column < 4 for patch in picture.patches)


def test_a_sweep_is_a_table_with_the_best_first(whole: Page, world: Path) -> None:
    shown = part(whole, world, "sweep")
    assert "Of 4 settings the best is top_concepts 3, lr_factor 0.1: CIDEr 90.0" in shown.text
    assert "failed: loss is <nan>" in shown.text and len(shown.all("svg")) == 4
    assert shown.text.index("90.0") < shown.text.index("failed: loss")


def test_a_run_and_an_evaluation_of_something_else_are_said_to_be(whole: Page, world: Path, tmp_path: Path) -> None:
    assert f"A PCM-Net was trained for 3 epochs on other data: {world / 'scenes'}. It was tested on" in whole.text
    assert "From captions to pictures to a captioner" not in whole.text
    shutil.copytree(world / "run", tmp_path / "run")
    document = json.loads((tmp_path / "run/config.json").read_text())
    digest = state_digest((world / "data/dataset.json").read_bytes())
    document["datasets"] = [{"path": "moved", "sha256": digest, "weight": 1}]
    (tmp_path / "run/config.json").write_text(json.dumps(document))
    make_report(everything(world, tmp_path / "r.html", run=str(tmp_path / "run"), **NO_PICTURES))
    text = Page((tmp_path / "r.html").read_text()).text
    assert f"trained for 3 epochs. The captioner of {world / 'run'} was tested on 5 pictures." in text
    assert "From captions to pictures to a captioner" in text


def test_the_runs_own_captioner_is_known_however_it_was_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = gather(everything(world, tmp_path / "r.html", **NO_DATA, **NO_PICTURES))
    assert facts.run is not None and facts.evaluation is not None
    (tmp_path / "link").symlink_to(world / "run")
    (tmp_path / "other/run/best").mkdir(parents=True)

    def lead(recorded: str, run: str = str(world / "run"), folder: Path = world) -> str:
        monkeypatch.chdir(folder)
        asked = {"request": {**facts.evaluation["request"], "checkpoint": recorded}}
        known = replace(facts, run=replace(facts.run, root=run), evaluation={**facts.evaluation, **asked})
        return headline(known, title=None, hourly=None).lead

    own = ["run", "./run/best/", str(world / "run/best"), f"file://{world}/run", str(tmp_path / "link")]
    assert all("It was tested on" in lead(recorded) for recorded in own)
    assert "It was tested on" in lead(str(world / "run"), run=f"file://{world}/run")
    assert "It was tested on" in lead("run/best", folder=tmp_path)  # the report is made in another folder
    assert "It was tested on" in lead("s3://bucket/run/best", run="s3://bucket/run/")
    for other in ("link/best", "run/best", str(tmp_path / "other/run"), "file:///else/run", "s3://bucket/run", "run2"):
        assert f"The captioner of {other} was tested on" in lead(other, folder=tmp_path / "other")


def test_what_is_not_given_is_said(world: Path, tmp_path: Path) -> None:
    made = make_report(ReportRequest(out=str(tmp_path / "r.html"), data=str(world / "scenes")))
    assert made["sections"] == ["pictures", "scores", "speed", "quarantine", "dataset"]
    text = Page((tmp_path / "r.html").read_text()).text
    for said in ("no training run given (--run)", "no evaluation given", "no real pictures given", "no sweep given"):
        assert said in text
    assert "has no shard statistics" in text and "Nothing: all 60 samples are stored" in text
    assert "it has no plan.json" in text


def test_the_same_request_gives_the_same_bytes(whole: Page, world: Path, tmp_path: Path) -> None:
    first = (world / "report.html").read_bytes()
    make_report(everything(world, world / "report.html"))
    assert (world / "report.html").read_bytes() == first


def test_the_command_that_verifies_a_large_dataset_is_quoted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_facts, "VERIFIED_BYTES", 0)
    (tmp_path / "my data; id").symlink_to(world / "data")
    facts = dataset_facts.gather_dataset(open_store(tmp_path / "my data; id"), seed=0)
    assert facts.unverified.endswith(f"run python -m jobs.verify '{tmp_path}/my data; id'")


def test_of_a_large_dataset_a_part_is_read(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_facts, "MAX_STATS", 2)
    read: list[str] = []
    real = Store.read_bytes
    monkeypatch.setattr(Store, "read_bytes", lambda store, key: read.append(key) or real(store, key))
    facts = dataset_facts.gather_dataset(open_store(world / "data"), seed=0)
    assert len([key for key in read if key.startswith("stats/")]) >= 2 and len(facts.stats) == 2
    chosen = dataset_facts.sample_shards([3, 3, 2], seed=0, most=2)
    monkeypatch.setattr(dataset_facts, "sample_shards", lambda rows, *, seed: chosen)
    few = dataset_facts.gather_dataset(open_store(world / "data"), seed=0)
    assert {row.shard for row in few.rows} == set(chosen) and not few.complete_sample


def test_dataset_and_report_may_lie_on_an_object_store(world: Path, s3: S3Server) -> None:
    bucket, local = f"{s3.uri}/report", open_store(world / "data")
    for key in local.list():
        open_store(f"{bucket}/data").write_bytes(key, local.read_bytes(key))
    made = make_report(ReportRequest(out=f"{bucket}/pages/report.html", data=f"{bucket}/data"))
    page = Page(read_uri(f"{bucket}/pages/report.html").decode())
    assert made["path"] == f"{bucket}/pages/report.html" and SCRIPT in page.text and len(page.all("script")) == 1


def test_of_an_object_store_the_columns_alone_are_read_that_are_shown(
    tmp_path: Path, tiny_clip: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every shard whole, for its checksum: to verify is another job's work where a dataset is large."""
    write_dataset(tmp_path / "data", tiny_clip, rows=1200, shard_size=600)
    store, local = open_store(f"{s3.uri}/columns"), open_store(tmp_path / "data")
    for key in local.list():
        store.write_bytes(key, local.read_bytes(key))
    read: list[int] = []
    real = ObjectFile._next
    monkeypatch.setattr(ObjectFile, "_next", lambda file, count: read.append(count) or real(file, count))
    monkeypatch.setattr(dataset_facts, "VERIFIED_BYTES", 0)
    facts = dataset_facts.gather_dataset(store, seed=0)
    of_rows = sum(read)
    assert make_gallery(store, facts, seed=0).best
    whole = sum(shard.bytes for shard in facts.manifest.stored_shards)
    assert 0 < of_rows < whole / 8 and of_rows < sum(read) < whole / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None, "run": None, "evaluation": None, "sweep": None}, "nothing to report on"),
        ({"data": "nowhere"}, "not a dataset"),
        ({"run": "nowhere"}, "not a training run"),
        ({"evaluation": "nowhere"}, "not an evaluation"),
        ({"sweep": "nowhere"}, "not a sweep"),
        ({"run": None}, "needs --run"),
        ({"price_per_hour": float("nan")}, "--price-per-hour nan"),
        ({"out": "."}, "is a folder"),
        ({"out": "captions.jsonl/report.html"}, "captions.jsonl is a file, not a folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    world: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, said: str
) -> None:
    monkeypatch.chdir(world)
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        make_report(replace(everything(world, world / "refused.html"), **changes))
    assert "\n" not in str(raised.value) and not (world / "refused.html").exists()


def test_braces_and_percent_signs_in_paths_are_names(world: Path, tmp_path: Path, call_job: Callable) -> None:
    folder = tmp_path / "{0} {x} 50% %s a::b"
    for name in ("data", "run", "evaluation", "sweep"):
        shutil.copytree(world / name, folder / name)
    out = folder / "{report}.html"
    given = [text for name in ("data", "run", "evaluation", "sweep") for text in (f"--{name}", folder / name)]
    run = call_job("report", *given, "--out", out)
    assert run.returncode == 0, run.stderr
    assert "{0} {x} 50% %s a::b" in out.read_text() and run.summary["path"] == str(out)


def test_the_job_ends_with_the_path(world: Path, tmp_path: Path, call_job: Callable) -> None:
    done = call_job("report", "--run", world / "run", "--out", tmp_path / "r.html", "--title", "A <talk>")
    assert done.returncode == 0 and done.summary["ok"] is True and done.summary["path"] == str(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "A <talk>" in page.text and next(each for each in page.all("meta") if each.get("name") == "viewport")
    refused = call_job("report", "--out", tmp_path / "none.html")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert call_job("report", "--out", tmp_path / "x", "--references", "r.csv").returncode == 2
