"""A pilot is a part of the run it predicts, and predicts it right; a gate stops a run that is not worth its price."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.dataset.documents import Plan
from cluster.dataset.keys import stats_key
from cluster.dataset.verify import verify
from cluster.generation.cost import Billing
from cluster.generation.limits import PilotSize
from cluster.generation.pilot import Prediction, describe, pilot_shards, predict
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from tests.helpers.tiny_generation import (
    ANIMALS,
    CAPTIONS,
    PLACES,
    draw_in_process,
    make_dataset_in_process,
    plan_dataset,
    tiny_spec,
    write_corpus,
)

TWO_MACHINES = Billing(price_per_hour=2.0, unit="machine")
SOLO = {"draw": 1, "featurise": 1, "encode": 1, "store": 1}


@pytest.mark.parametrize(("text", "of_1000"), [("1%", 10), ("0.05%", 1), ("100%", 1000), ("1", 1), ("250", 250)])
def test_a_pilot_is_a_share_or_a_number(text: str, of_1000: int) -> None:
    assert PilotSize.parse(text).of(1000) == of_1000


@pytest.mark.parametrize("text", ["0%", "101%", "-1%", "nan%", "inf%", "%", "", "abc", "0", "-5", "1.5", "1 of 3"])
def test_a_size_that_means_nothing_is_one_line_and_exit_2(text: str, tmp_path: Path, call_job) -> None:
    run = call_job("generate", "--corpus", "embedded", "--out", tmp_path / "out", f"--pilot={text}")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and repr(text) in run.stderr
    assert not (tmp_path / "out").exists()


def test_more_samples_than_there_are_is_an_error() -> None:
    with pytest.raises(InputError, match="the whole has 64 samples"):
        PilotSize.parse("65").of(64)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    captions = [f"caption {number}" for number in range(1000)]
    return plan_dataset(folder / "data", write_corpus(folder, captions), tiny_spec(tiny_t2i), shard_size=10)[1]


def test_a_pilot_is_spread_over_the_plan(plan: Plan) -> None:
    assert pilot_shards(plan, 50, generators=1) == [10, 30, 50, 70, 90]
    for samples in (1, 10, 77, 500, 1000):
        for generators in (1, 8, 64):
            shards = pilot_shards(plan, samples, generators=generators)
            assert len(set(shards)) == len(shards) == max(generators, round(samples / 10), 1)
            assert shards[0] >= 0 and shards[-1] < 100 and sorted(shards) == shards
            gaps = {after - before for before, after in itertools.pairwise(shards)}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_pilot_has_a_shard_for_each_generator_and_no_more_than_there_are(plan: Plan) -> None:
    assert len(pilot_shards(plan, 10, generators=16)) == 16
    assert pilot_shards(plan, 10, generators=500) == list(range(100))


def prediction_from(store: Store, plan: Plan, shards: Sequence[int], **changed: object) -> Prediction:
    stats = [json.loads(store.read_bytes(stats_key(shard))) for shard in shards]
    known = {
        "expected": plan.expected, "usable": plan.usable, "pools": SOLO, "generators_score": True,
        "store_seconds": 0.001,
        "startup_seconds": 30.0, "billing": TWO_MACHINES, "machines": 2,
    }  # fmt: skip
    return predict(stats, **(known | changed))


def test_the_prediction_is_what_the_full_run_then_stores(tiny_t2i: Path, tiny_clip: Path, tmp_path: Path) -> None:
    # Broken captions are bunched at the end, where an even spread meets few of them.
    captions = [*CAPTIONS * 4, *["x" * 3000] * 24]
    corpus, spec = write_corpus(tmp_path, captions), tiny_spec(tiny_t2i, tiny_clip)
    store, plan = plan_dataset(tmp_path / "data", corpus, spec, shard_size=10)
    shards = pilot_shards(plan, 30, generators=1)
    draw_in_process(store, plan, shards)
    predicted = prediction_from(store, plan, shards)
    made = [(tmp_path / "data" / f"shards/part-{shard:06d}.parquet").stat().st_mtime_ns for shard in shards]
    _, _, manifest = make_dataset_in_process(tmp_path / "data", corpus, spec, shard_size=10)
    assert manifest is not None
    assert (
        (predicted.predicted_images, predicted.predicted_quarantined)
        == (manifest.stored, manifest.quarantined)
        == (96, 24)
    )
    assert predicted.predicted_bytes == pytest.approx(manifest.shard_bytes, rel=0.1)
    assert predicted.clip_score_mean == pytest.approx(
        manifest.clip_score_mean, abs=5 * predicted.clip_score_standard_error
    )
    again = [(tmp_path / "data" / f"shards/part-{shard:06d}.parquet").stat().st_mtime_ns for shard in shards]
    assert again == made, "the full run keeps what the pilot made"


def shard(**changed: object) -> dict:
    return {
        "count": 100, "successes": 98, "quarantined_by_reason": {"black_image": 2}, "bytes": 1_000_000,
        "draw_seconds": 50.0, "featurise_seconds": 10.0, "encode_seconds": 1.0,
        "clip_score_sum": 29.4, "clip_score_sum_of_squares": 9.0, "clip_score_histogram": [0] * 26 + [98] + [0] * 13,
    } | changed  # fmt: skip


def predict_from(stats: list[dict], **changed: object) -> Prediction:
    known = {
        "expected": 100_000, "usable": 100_000, "pools": {"draw": 4, "featurise": 1, "encode": 1, "store": 1},
        "generators_score": False, "store_seconds": 0.01, "startup_seconds": 60.0, "billing": TWO_MACHINES,
        "machines": 2,
    }  # fmt: skip
    return predict(stats, **(known | changed))


def test_the_slowest_pool_sets_the_pace() -> None:
    assert predict_from([shard()]).bottleneck == "draw"  # 0.5 s over four, against 0.1 s and 0.02 s
    prediction = predict_from([shard()])
    assert prediction.predicted_seconds == pytest.approx(60 + 100_000 * 0.125)
    assert prediction.predicted_images_per_second == pytest.approx(0.98 * 8)
    assert prediction.predicted_generator_hours == pytest.approx(4 * (60 + 12_500) / 3600)
    assert prediction.predicted_cost == pytest.approx(2 * 2.0 * (60 + 12_500) / 3600)
    assert predict_from([shard()], store_seconds=0.3).bottleneck == "write"
    slow_clip = predict_from([shard(featurise_seconds=20.0)])
    assert (slow_clip.bottleneck, slow_clip.predicted_seconds) == ("featurise", pytest.approx(60 + 100_000 * 0.2))


def test_a_start_up_that_was_not_measured_is_said_to_come_on_top() -> None:
    prediction = predict_from([shard()], startup_seconds=None, store_seconds=0.0)
    assert prediction.startup_seconds is None and prediction.predicted_seconds == pytest.approx(12_500)
    line = next(line for line in describe(prediction, generators=4) if "images/s" in line)
    assert line.endswith("; start-up and storing not measured (nothing was drawn now): they come on top")
    assert describe(predict_from([shard()]), generators=4)[2].endswith("; start-up 1 min 00 s")


def test_the_seconds_a_picture_are_those_of_one_generator() -> None:
    prediction = predict_from([shard()])
    assert prediction.predicted_seconds_an_image == pytest.approx(0.5 / 0.98)
    said = describe(prediction, generators=4)
    assert any("with 4 generators (0.5102 s a picture and generator), limited by draw" in line for line in said)
    nothing = predict_from([shard(successes=0, quarantined_by_reason={"black_image": 100})])
    assert nothing.predicted_seconds_an_image is None


def test_the_null_clips_scores_are_none() -> None:
    prediction = predict_from([shard(clip_score_sum=0.0, clip_score_sum_of_squares=0.0)], scored=False)
    assert prediction.clip_score_mean is None and prediction.clip_score_standard_error is None
    assert "  mean clip score none" in describe(prediction, generators=4)


def test_a_generator_that_scores_needs_the_time_of_both() -> None:
    pools = {"draw": 4, "featurise": 4, "encode": 1, "store": 1}
    both = predict_from([shard(featurise_seconds=20.0)], generators_score=True, pools=pools)
    assert (both.bottleneck, both.predicted_seconds) == ("draw", pytest.approx(60 + 100_000 * (0.5 + 0.2) / 4))


def test_gpu_hours_count_the_gpus_that_are_reserved() -> None:
    billing = Billing(price_per_hour=2.5, unit="GPU", units_per_generator=1.0)
    prediction = predict_from([shard()], billing=billing)
    assert prediction.predicted_gpu_hours == pytest.approx(prediction.predicted_generator_hours)
    assert prediction.predicted_cost == pytest.approx(2.5 * prediction.predicted_gpu_hours)


def test_broken_captions_are_not_mistaken_for_failures_of_the_model() -> None:
    part = shard(successes=80, quarantined_by_reason={"too_long": 18, "black_image": 2})
    prediction = predict_from([part], usable=99_000)  # 1% of the corpus is broken, 18% of the pilot
    assert prediction.predicted_images == round(99_000 * 80 / 82)
    assert prediction.predicted_quarantined_share == pytest.approx(1 - prediction.predicted_images / 100_000)


def test_a_pilot_of_broken_captions_says_so() -> None:
    with pytest.raises(InputError, match="none of its 100 captions is usable"):
        predict_from([shard(successes=0, quarantined_by_reason={"empty": 100})])


def test_a_pilot_on_ray_is_the_beginning_of_the_full_run(tmp_path: Path, ray_session: None, call_job) -> None:
    corpus = write_corpus(tmp_path, CAPTIONS)
    arguments = ["--corpus", corpus, "--out", tmp_path / "data", "--t2i", "null", "--shard-size", 4, "--generators", 2]
    pilot = call_job("generate", *arguments, "--pilot", "5%", "--price-per-hour", "1.5")
    assert pilot.returncode == 0, pilot.stderr
    said = pilot.summary
    assert (said["pilot_samples"], said["pilot_shards"], said["generated"]) == (8, 2, 8)
    assert (said["predicted_images"], said["predicted_gpu_hours"]) == (24, None)
    assert said["predicted_cost"] > 0 and said["startup_seconds"] > 0 and said["cost"] > 0
    again = call_job("generate", *arguments, "--pilot", "5%")
    assert again.summary["startup_seconds"] is None
    assert again.summary["images_per_second"] is None, "nothing was drawn"
    store = open_store(str(tmp_path / "data"))
    assert len(store.list("shards")) == 2 and not store.exists("dataset.json")
    full = call_job("generate", *arguments)
    assert full.returncode == 0, full.stderr
    assert (full.summary["skipped"], full.summary["generated"], full.summary["stored"]) == (8, 16, 24)
    assert full.summary["cost"] is None
    assert said["predicted_bytes"] == pytest.approx(sum(store.size(key) for key in store.list("shards")), rel=0.05)
    assert verify(store)["ok"]


@pytest.mark.slow
def test_the_gate_stops_in_one_line_and_keeps_what_is_committed(
    tmp_path: Path, tiny_clip: Path, ray_session: None, call_job
) -> None:
    captions = [f"a {animal} {where} the {place}" for animal in ANIMALS for where in ("near", "on") for place in PLACES]
    arguments = [
        "--corpus", write_corpus(tmp_path, captions * 4), "--out", tmp_path / "data", "--t2i", "null",
        "--clip", tiny_clip, "--shard-size", 16, "--device", "cpu",
    ]  # fmt: skip
    stopped = call_job("generate", *arguments, "--stop-below-clip-score", "0.95")
    assert stopped.returncode == 2 and stopped.summary is None
    line = stopped.stderr.strip().splitlines()[-1]
    assert line.startswith("error: mean clip score") and "--stop-below-clip-score 0.95" in line and "--only 0" in line
    store = open_store(str(tmp_path / "data"))
    assert len(store.list("shards")) >= 4 and not store.exists("dataset.json")
    assert {pq.read_metadata(f"{store.prefix}/{key}").num_rows for key in store.list("shards")} == {16}


def test_a_gate_without_a_clip_is_refused(tmp_path: Path, ray_session: None, call_job) -> None:
    run = call_job(
        "generate", "--corpus", "embedded", "--out", tmp_path / "out", "--t2i", "null", "--stop-below-clip-score", "0.2"
    )
    assert run.returncode == 2 and "--clip null gives no scores" in run.stderr
