"""`ray job submit`, as the README types it, on a head with token authentication."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.dataset.verify import verify
from cluster.store.store import open_store
from cluster.submit_size import MEBIBYTE, main, packed_files
from tests.helpers.paths import ROOT
from tests.helpers.ports import free_ports
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_dataset import TINY, write_checkpoint, write_dataset, write_pictures
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, null_spec, write_corpus
from tests.helpers.trained import step_losses
from tests.helpers.waiting import wait_until

TINY_SETTINGS = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A running head: the addresses of its job server and of the cluster itself, and a client's environment."""

    address: str
    cluster: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with a token, a temporary folder and ports of its own; the home directory is not touched."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Job, driver and workers find the project's packages where this interpreter has them.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard, agent = free_ports(3)
    # A socket's path must be short, which pytest's temporary folders are not.
    session = Path("/tmp") / f"pcm-{os.getpid()}"
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={session}", "--disable-usage-stats", "--object-store-memory=200000000",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    try:
        deadline = time.monotonic() + 180
        # The agent, which starts the jobs' drivers, comes up last.
        while not (answers(f"{head.address}/api/jobs/") and answers(f"http://127.0.0.1:{agent}/api/job_agent/jobs/")):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield head
    finally:
        # Asked to end, it would wait half a minute for each of its processes.
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        subprocess.run(["rm", "-rf", str(session)], check=False)


def answers(address: str) -> bool:
    """Whether a server is up, which it shows by refusing a request without a token."""
    try:
        urllib.request.urlopen(address, timeout=5)
    except urllib.error.HTTPError as error:
        assert error.code in (401, 403), error
        return True
    except OSError:
        return False
    raise AssertionError(f"{address} answers without a token")


def submit(head: Head, *entrypoint: object, **environment: str | None) -> subprocess.CompletedProcess:
    return ray_job(head, "submit", "--working-dir", ".", "--", *entrypoint, **environment)


def ray_job(head: Head, what: str, *arguments: object, **environment: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in (head.environment | environment).items() if value is not None}
    return subprocess.run(
        [RAY, "job", what, "--address", head.address, *map(str, arguments)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def begin(head: Head, name: str, *entrypoint: object) -> None:
    """Submit a job of this name, and do not wait for it."""
    begun = ray_job(head, "submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *entrypoint)
    assert begun.returncode == 0, begun.stdout + begun.stderr


def logs(head: Head, name: str) -> str:
    return ray_job(head, "logs", name).stdout


def ended(head: Head, name: str) -> bool:
    said = ray_job(head, "status", name).stdout
    return any(f"Job '{name}' {how}" in said for how in ("succeeded", "failed", "was stopped"))


def summaries(printed: str) -> list[dict]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]


def stop_at_work(head: Head, name: str, at_work: Callable[[], bool], *entrypoint: object) -> None:
    """Submit a job, and stop it in the middle of its work."""
    begin(head, name, *entrypoint)
    wait_until(at_work, seconds=400, said=f"{name} did not come to its work")
    stopped = ray_job(head, "stop", name)
    assert stopped.returncode == 0 and f"Job '{name}' was stopped" in stopped.stdout, stopped.stdout + stopped.stderr


def test_a_submitted_job_makes_a_dataset(head: Head, tmp_path: Path) -> None:
    corpus, out = write_corpus(tmp_path), tmp_path / "out"
    done = submit(head, "python", "-m", "jobs.generate", "--corpus", corpus, "--out", out, "--t2i", "null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [summary["stored"] for summary in summaries(done.stdout)] == [len(CAPTIONS)]
    report = verify(open_store(out))
    assert report["ok"] and report["stored"] == len(CAPTIONS)


@pytest.mark.slow
def test_generation_that_was_stopped_goes_on_when_it_is_submitted_again(head: Head, tmp_path: Path) -> None:
    count = 600
    corpus, out = write_corpus(tmp_path, [f"caption number {number}" for number in range(count)]), tmp_path / "out"
    command = ("python", "-m", "jobs.generate", "--corpus", corpus, "--out", out, "--t2i", "null", "--shard-size", 1)
    stop_at_work(head, "generation", lambda: shards_stored(out) >= 5, *command)
    before = shards_stored(out)
    assert 5 <= before < count
    done = submit(head, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = summaries(done.stdout)
    assert summary["skipped"] >= before and summary["skipped"] + summary["generated"] == count
    undisturbed, *_ = make_dataset_in_process(tmp_path / "undisturbed", corpus, null_spec(), shard_size=64)
    report = verify(open_store(out))
    assert report["ok"] and report["fingerprint"] == verify(undisturbed)["fingerprint"]


@pytest.mark.slow
def test_two_jobs_share_a_cluster_and_the_second_says_what_it_waits_for(head: Head, tmp_path: Path) -> None:
    """The first one's generators hold the CPUs, and draw long enough to be at it when the second asks."""
    first, second = tmp_path / "first", tmp_path / "second"
    model = ("--corpus", "embedded", "--limit", 32, "--steps", 60, "--shard-size", 2)
    begin(head, "one", "python", "-m", "jobs.generate", *model, "--out", first)
    wait_until(lambda: shards_stored(first) >= 1 or ended(head, "one"), seconds=400, said="nothing drawn")
    corpus = write_corpus(tmp_path)
    begin(head, "two", "python", "-m", "jobs.generate", "--corpus", corpus, "--out", second, "--t2i", "null")
    for name in ("one", "two"):
        wait_until(lambda name=name: ended(head, name), seconds=800, said=f"{name}: {logs(head, name)[-3000:]}")
    assert [summary["stored"] for summary in summaries(logs(head, "one"))] == [32]
    said = logs(head, "two")
    assert [summary["stored"] for summary in summaries(said)] == [len(CAPTIONS)]
    assert "waiting for 1 generator to start" in said and "of the cluster's 2 CPUs are free" in said
    assert verify(open_store(first))["ok"] and verify(open_store(second))["ok"]


@pytest.mark.slow
def test_training_that_was_stopped_goes_on_when_it_is_submitted_again(
    head: Head, tmp_path: Path, tiny_clip: Path
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=96), tmp_path / "run"

    def train(at: Path) -> list:
        options = ["--data", data, "--out", at, "--epochs", 12, "--cpus-per-worker", 1]
        return ["python", "-m", "jobs.train", *options, *TINY_SETTINGS]

    stop_at_work(head, "training", lambda: (out / "metrics.jsonl").exists(), *train(out))
    for command in ([*train(out), "--resume"], train(tmp_path / "alone")):
        done = submit(head, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [summary["epochs"] for summary in summaries(done.stdout)] == [12]
    assert step_losses(out) == step_losses(tmp_path / "alone")


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_when_it_is_submitted_again(
    head: Head, tmp_path: Path, tiny_clip: Path
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=96), tmp_path / "sweep"
    grid = ("--param=lr_factor=0.1,0.2,0.4", "--search=grid", "--epochs=4")
    command = ("python", "-m", "jobs.sweep", "--data", data, "--out", out, *grid, *TINY_SETTINGS)
    stop_at_work(head, "sweep", lambda: any(out.glob("trials/*/best/*")), *command)
    done = submit(head, *command, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [summary["trials"] for summary in summaries(done.stdout)] == [3]


@pytest.mark.slow
def test_streaming_that_was_stopped_goes_on_when_it_is_submitted_again(
    head: Head, tmp_path: Path, tiny_clip: Path, tiny_t2i: Path
) -> None:
    corpus = write_corpus(tmp_path, [f"A red circle on a green ground, number {number}." for number in range(60)])
    out = tmp_path / "out"
    models = ("--t2i", tiny_t2i, "--clip", tiny_clip, "--steps=2", "--shard-size=5", "--set=top_concepts=2")
    command = ("python", "-m", "jobs.stream", "--corpus", corpus, "--out", out, "--epochs=3", *models, *TINY_SETTINGS)
    stop_at_work(head, "stream", lambda: shards_stored(out / "dataset") > 2, *command)
    done = submit(head, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    report = verify(open_store(out / "dataset"))
    assert report["ok"] and report["stored"] == 60


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_is_made_when_it_is_submitted_again(
    head: Head, tmp_path: Path, tiny_clip: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", write_dataset(tmp_path / "data", tiny_clip, rows=30))
    count = 64 * 50
    pictures, references = write_pictures(tmp_path / "pictures", count=count), tmp_path / "references.csv"

    def evaluate(out: str, *workers: object) -> list:
        asked = ["--checkpoint", checkpoint, "--images", pictures, "--references", references, "--device", "cpu"]
        return ["python", "-m", "jobs.evaluate", *asked, "--out", tmp_path / out, *workers]

    command = evaluate("out", "--num-workers", 2)
    stop_at_work(head, "evaluation", lambda: "pictures captioned" in logs(head, "evaluation"), *command)
    assert not (tmp_path / "out/metrics.json").exists()
    found = []
    for each in (command, evaluate("alone")):
        done = submit(head, *each)
        assert done.returncode == 0, done.stdout + done.stderr
        found += summaries(done.stdout)
    assert [summary["n"] for summary in found] == [count, count]
    assert (tmp_path / "out/captions.json").read_bytes() == (tmp_path / "alone/captions.json").read_bytes()
    assert found[0]["CIDEr"] == found[1]["CIDEr"]


@pytest.mark.slow
def test_a_refinement_that_was_stopped_goes_on_when_it_is_submitted_again(head: Head, tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = submit(
        head, "python", "-m", "jobs.generate", "--corpus", "embedded", "--limit", 48, "--shard-size", 4, "--out", data
    )
    assert made.returncode == 0, made.stdout + made.stderr

    def redraw(out: Path) -> list:
        asked = ["--method", "redraw", "--budget", 48, "--rounds", 2]
        return ["python", "-m", "jobs.refine", "--data", data, "--out", out, *asked]

    out = tmp_path / "out"
    stop_at_work(head, "redraw", lambda: len(list(out.glob("redraws/*/shards/*.parquet"))) > 1, *redraw(out))
    assert not (out / "dataset.json").exists()
    found = []
    for place in (out, tmp_path / "alone"):
        done = submit(head, *redraw(place))
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(verify(open_store(place)))
    assert [each["ok"] for each in found] == [True, True]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]


@pytest.mark.slow
def test_a_driver_that_joins_by_its_address_trains_there(head: Head, tmp_path: Path, tiny_clip: Path) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=24), tmp_path / "run"
    arguments = [*("--data", data, "--out", out, "--epochs", 1, "--cpus-per-worker", 1), *TINY_SETTINGS]

    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *map(str, arguments)],
        cwd=ROOT, env=head.environment | {"RAY_ADDRESS": head.cluster}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "joined the Ray cluster at RAY_ADDRESS: 2 CPU" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == 1 and (out / "best" / "model.safetensors").exists()


@pytest.mark.slow
def test_bad_input_comes_back_as_a_failed_submission_with_its_line(head: Head, tmp_path: Path) -> None:
    done = submit(head, "python", "-m", "jobs.generate", "--corpus", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "none.txt" in done.stdout + done.stderr and "exit code 2" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_token_nothing_is_run(head: Head, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    wrong = submit(head, "touch", marker, RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_AUTH_TOKEN_PATH=None)
    none = submit(head, "touch", marker, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=None)
    assert wrong.returncode != 0 and none.returncode != 0
    assert "auth" in (wrong.stdout + wrong.stderr).lower()
    assert not marker.exists()


def test_what_is_uploaded_is_the_code_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    """What .gitignore and .rayignore name stays here; the embedded pack goes along, far below the limit of 100 MiB."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).symlink_to(ROOT / name)
    # What a user's checkout has besides: a dataset made by the README's own command, captions and weights, own code.
    beside = (
        "sample/shards/part-000000.parquet", "runs/one/checkpoint/model.safetensors", "pcm/__pycache__/x.pyc",
        "dataset_coco.json", "captions_train2017.json", "model.safetensors", "weights.pt", "val2014.zip", "cc3m.tar.gz",
        "Train_GCC-training.tsv",
    )  # fmt: skip
    own = ("my_generator.py", "few_captions.txt")
    for name in (*beside, *own):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(1000))
    create_package(str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert DASHBOARD_CLIENT_MAX_SIZE == 100 * MEBIBYTE
    assert package.stat().st_size < DASHBOARD_CLIENT_MAX_SIZE / 2
    told = sum(size for size, _ in packed_files(checkout))
    assert told <= package.stat().st_size <= told * 1.05, "the check counts what Ray packs"
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}  # Ray sends empty folders
    assert {
        "jobs/generate.py",
        "constraints.txt",
        "pcm/spec.py",
        "pcm/embedded/pack/clip/open_clip_config.json",
        *own,
    } <= names
    assert not names & set(beside)
    assert {name.partition("/")[0] for name in names if "/" in name} == {"benchmarks", "cluster", "jobs", "pcm"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_check_says_in_one_line_what_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / ".rayignore").write_text("/*.safetensors\n")
    (tmp_path / "job.py").write_text("print()")
    for name, size in (("model.safetensors", 200), ("pictures.bin", 99)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * MEBIBYTE)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "99.0 MiB in 3 files; Ray takes 100 MiB; the largest: pictures.bin 99.0, "
    )
    with (tmp_path / "notes.bin").open("wb") as file:
        file.truncate(MEBIBYTE)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 100.0 MiB in 4 files; ") and line.endswith(
        "name in .rayignore what the job does not need"
    )
    assert main([str(tmp_path / "none")]) == 2
