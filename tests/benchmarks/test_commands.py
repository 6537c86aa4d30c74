"""Every benchmark's command runs at its smallest size, and prints the figures that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import PAGE
from tests.helpers.hosts import can_make_hosts
from tests.helpers.paths import ROOT

#: (command, figures that it prints above 0, with a dot between a field and what lies in it)
QUICK = [
    (
        "cost_guide --images 1000 --seconds-an-image 1 --price-per-hour 2",
        ["gpu_hours", "money", "gigabytes", "shards", "store_requests"],
    ),
    ("matmul_rate --repeats 1", ["gflops.float32", "gflops.bfloat16"]),
    ("schedule --generators 4 --shards-each 3 --seeds 1", ["hours", "hours_without_idle_time", "idle_share"]),
    ("schedule --generators 4 --shards-each 3 --seeds 1 --no-turns --hours-between-deaths 2", ["hours", "idle_share"]),
    ("gpu --device cpu --size tiny --budget 0", ["cores"]),
    ("beam_search --repeats 1 --batch 2 --beam 2", ["captions_per_second", "words", "matmul_gflops"]),
    (
        "view_reading --rows 32 --shard-rows 8 --rounds 1",
        [
            "samples_per_second.source",
            "samples_per_second.view",
            "cpu_microseconds_per_sample.view",
            "view_over_source",
        ],
    ),
    (
        "reading_order --rows 20000 --shard-rows 16 --batch-size 4 --ranks 2",
        ["before_the_first_step.imports_mib", "shard_reads_over_shards.1", "shard_reads_over_shards.2"],
    ),
    (
        "refine --pairs 300 --block-size 128",
        ["pairs_per_second", "own_picture", "peak_mb", "gflops", "hours", "cpu_hours"],
    ),
    ("refine --pairs 300 --block-size 128 --blocks 1", ["queries", "peak_mb", "cpu_seconds_by_stage.candidates"]),
]
SLOW = [
    (
        "write_path --rows 4 --shards 2 --rounds 1 --image-kb 10",
        ["disk.stage_mb_per_second", "disk.ratio", "s3.bare_mb_per_second", "s3.ratio"],
    ),
    (
        "diffusion --size tiny --steps 1 --batch-size 1 --repeats 1 --options channels_last",
        ["options.channels_last.ratio", "options.channels_last.images_per_second"],
    ),
    ("training_step --repeats 1 --batch 2", ["float32.seconds", "float32.gflop", "float32.share_of_matmul_rate"]),
    (
        "training_step --repeats 1 --batch 2 --compare --threads 1",
        ["seconds.plain_over_kernels", "processor_seconds.plain_over_kernels"],
    ),
    (
        "beam_search --repeats 1 --batch 2 --beam 2 --captions embedded --train-steps 1 --weights {folder}/weights",
        ["captions_per_second", "words_of_the_references"],
    ),
    (
        "data_path --rows 64 --shard-rows 16 --rounds 1",
        ["samples_per_second.shards", "over_npz.shards", "over_npz.cached_int8", "over_trainer.cached"],
    ),
    ("refine --pairs 300 --block-size 128 --ray", ["pairs_per_second", "own_picture", "hours"]),
    (
        "null_scale --rows 100 --shard-size 10",
        ["rows_per_second", "driver_peak_mb", "raylet_peak_mb", "operations_a_shard.write_bytes"],
    ),
    (
        "planning --captions 2000 4000 --projected 10000",
        ["objects", "vocabulary", "plan.driver_cpu_seconds", "words.task_cpu_seconds", "rerun.seconds"],
    ),
    ("resume --shards 10", ["shards", "job_seconds", "skipped"]),
    (
        "pipeline_ratio --steps 1 --shards 3 --shard-size 2 --batch-size 2 --generators 1 --rounds 1",
        ["ratio", "stage_cpu_ratio", "background_cores", "bare_images_per_second", "startup_seconds"],
    ),
    ("stream --captions 32 --shard-size 16", ["stream_over_both", "epoch_over_alone", "first_step_seconds"]),
    (
        "dry_run --folder {folder}/dry --size tiny",
        ["weights_gigabytes", "generate.summary.stored", "generate.seconds", "train.summary.steps"],
    ),
]
#: Their commands are run by the tests below, or in the file that is named.
OTHERS = {"start_up", "models", "experiments", "idle_gpus"}


def run_benchmark(command: str) -> str:
    """What it prints. The command must succeed."""
    words = [sys.executable, "-m", *f"benchmarks.{command}".split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("command", "figures"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_benchmark_prints_its_figures(command: str, figures: list[str], tmp_path: Path) -> None:
    printed: dict = {}
    for line in run_benchmark(command.format(folder=tmp_path)).splitlines():
        printed |= json.loads(line)
    for figure in figures:
        value = printed
        for name in figure.split("."):
            value = value[name]
        assert isinstance(value, int | float) and value > 0, (figure, value)


def test_start_up_prints_the_cpu_seconds_of_each_line_and_of_each_process() -> None:
    lines = run_benchmark("start_up jobs").splitlines()
    assert lines[0] == "seconds  CPU seconds  line" and "CPU seconds  process" in lines
    (ended,) = [line for line in lines if "ended with status 0" in line]
    assert float(ended.split()[1]) > 0
    assert "-m jobs" in lines[-1] and float(lines[-1].split()[0]) > 0


def test_models_writes_the_row_that_its_page_has(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    row = run_benchmark(f"models --clip RN50 --again --page {page}").splitlines()[-1]
    assert row.startswith("| RN50 |")
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_experiments_says_its_steps() -> None:
    """The steps themselves: test_experiments.py, test_worth.py."""
    assert "worth" in run_benchmark("experiments --help")


@pytest.mark.slow
@pytest.mark.skipif(not can_make_hosts(), reason="needs root and iproute2")
def test_idle_gpus_says_what_the_gpus_of_this_tree_did() -> None:
    arguments = "--rounds 1 --hosts 2 --shards 8 --join-seconds 1 --load-seconds 1 --shard-seconds 0.5"
    found = json.loads(run_benchmark(f"idle_gpus {arguments}").splitlines()[-1])["."]
    assert 0 < found["idle_share"][0] < 1 and found["drawing"] > 0 and found["gpu_seconds"] > 0


def test_no_command_is_left_out() -> None:
    here = ROOT / "benchmarks"
    files = [path for path in here.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    commands = {path.stem for path in files} | {path.parent.name for path in here.glob("*/__main__.py")}
    assert commands == OTHERS | {command.split()[0] for command, _ in QUICK + SLOW}
