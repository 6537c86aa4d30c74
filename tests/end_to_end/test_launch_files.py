"""The files for Slurm and SkyPilot: their shell is run here by a Slurm of one machine, as far as that goes."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from ray.util import get_node_ip_address

from tests.helpers.hosts import OF_ONE_MACHINE
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT

SLURM = ROOT / "deploy/slurm.sbatch"
#: What Slurm's `srun` does for this file, with every node on this machine: it runs the command after its own options.
SRUN = """#!/bin/bash
echo "srun $*" >> "$SRUN_LOG"
[[ $* == *"--exclude"* ]] && sleep "${WORKER_IS_LATE:-0}" &> /dev/null
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def sky() -> dict:
    return yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())


def surroundings() -> dict[str, str]:
    """This process's, without what the tests' own Ray says to the processes that they start."""
    return {name: value for name, value in os.environ.items() if name != OF_ONE_MACHINE and "RAY_AUTH" not in name}


def run_slurm(folder: Path, *command: object, nodes: int, **settings: str) -> subprocess.CompletedProcess:
    (folder / "bin").mkdir()
    (folder / "bin/srun").write_text(SRUN)
    (folder / "bin/srun").chmod(0o755)
    (folder / ".venv").symlink_to(sys.prefix)
    environment = surroundings() | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SRUN_LOG": str(folder / "srun.log"),
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURMD_NODENAME": "node-7",
        **settings,
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SLURM), *map(str, command)], env=environment, capture_output=True, text=True, timeout=540
    )


def test_the_shell_of_both_files_is_well_formed(sky: dict) -> None:
    for text in (SLURM.read_text(), sky["run"]):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_slurm_without_a_command_says_what_to_give(tmp_path: Path) -> None:
    done = run_slurm(tmp_path, nodes=1)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "jobs.generate" in line


@pytest.mark.slow
def test_the_job_runs_on_a_head_and_a_worker_with_a_token_that_is_on_no_command_line(tmp_path: Path) -> None:
    done = run_slurm(
        tmp_path, "jobs.generate", "--corpus", "embedded", "--limit", 8, "--shard-size", 4, "--t2i", "null", "--device",
        "cpu", "--generators", 1, "--out", tmp_path / "out", nodes=2, WORKER_IS_LATE="15",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert summary["dataset"] == str(tmp_path / "out")
    assert "all 2 nodes have come" in done.stderr
    assert f"joined the Ray cluster at RAY_ADDRESS: {2 * (os.cpu_count() or 1)} CPU" in done.stderr, "both are counted"
    head, worker = (tmp_path / "srun.log").read_text().splitlines()
    assert "ray start --head" in head and "--address" in worker
    assert "--nodelist=node-7" in head and "--exclude=node-7" in worker, "by Slurm's name of it"
    assert not re.search(r"[0-9a-f]{64}", head + worker + done.stdout + done.stderr)
    temporary = f"/tmp/ray-{os.getpid()}"
    left = subprocess.run(["pgrep", "--full", temporary], capture_output=True, text=True).stdout
    assert not left, "Ray outlives the job"


@pytest.mark.slow
def test_a_node_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    done = run_slurm(
        tmp_path, "jobs.generate", "--corpus", "embedded", "--limit", 8, "--shard-size", 4, "--t2i", "null", "--device",
        "cpu", "--generators", 1, "--out", tmp_path / "out", nodes=2, WORKER_IS_LATE="200", LONGEST_WAIT="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"1 of 2 nodes have come in \d+ s; beginning without the others", done.stderr)


@pytest.mark.slow
def test_the_status_of_the_command_is_the_jobs(tmp_path: Path) -> None:
    done = run_slurm(tmp_path, "jobs.generate", "--corpus", "embedded", nodes=1)  # no --out
    assert done.returncode == 2 and "--out: missing" in done.stderr


@pytest.mark.slow
def test_sky_ends_on_every_machine_with_the_job_and_can_be_launched_again_there(sky: dict, tmp_path: Path) -> None:
    """Both machines are this one, and Ray has a port and a folder of the test's own."""
    port, temporary = str(20000 + os.getpid() % 20000), f"/tmp/ray-{os.getpid()}"  # a socket's path has 107 bytes
    script = sky["run"].replace("6379", port).replace("/tmp/ray-pcmnet", temporary).replace("cuda", "cpu")
    environment = surroundings() | {
        **{name: str(value) for name, value in sky["envs"].items()},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "CORPUS": "embedded", "OUT": str(tmp_path / "out"), "T2I": "null", "CLIP": "null", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": f"{get_node_ip_address()}\nanother",
    }  # fmt: skip
    for _ in range(2):
        with ExitStack() as stack:
            machines = [
                stack.enter_context(
                    running(
                        ["bash", "-c", script], env=environment | {"SKYPILOT_NODE_RANK": str(rank)}, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    )
                )
                for rank in (1, 0)
            ]  # fmt: skip
            said = [machine.communicate(timeout=200)[0] for machine in reversed(machines)][::-1]
        assert [machine.returncode for machine in machines] == [0, 0], said
        left = subprocess.run(["pgrep", "--full", temporary], capture_output=True, text=True).stdout
        assert not left, "Ray outlives the job"
    summary = json.loads(next(line for line in reversed(said[1].splitlines()) if line.startswith("{")))
    assert summary["generated"] == 0, "the second launch found everything made"


def test_sky_gives_the_job_options_that_it_has(sky: dict) -> None:
    from jobs.generate import JOB

    script = sky["run"].replace("\\\n", " ")
    command = next(line for line in script.splitlines() if "jobs.generate" in line)
    for name, value in (sky["envs"] | {"SKYPILOT_NUM_NODES": sky["num_nodes"]}).items():
        command = command.replace(f"${name}", str(value))
    words = shlex.split(command)
    asked = JOB.read(words[words.index("jobs.generate") + 1 :])
    assert (asked.device, asked.generators) == ("cuda", sky["num_nodes"])
    assert sky["envs"]["RAY_AUTH_MODE"] == "token"


def test_sky_takes_secrets_by_name(sky: dict) -> None:
    assert sky["secrets"] == {"HF_TOKEN": "", "RAY_AUTH_TOKEN": None}  # None: must be given
