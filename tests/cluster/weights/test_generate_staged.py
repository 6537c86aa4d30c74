"""A whole run with its models on a store: the dataset of the folders, made by processes that share one copy."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.store.store import open_store
from cluster.weights.node_copy import CACHE_VARIABLE
from tests.helpers.job_runs import JobRun
from tests.helpers.seaweedfs import S3Server
from tests.helpers.tiny_generation import write_corpus


@pytest.mark.slow
def test_a_run_from_a_bucket_is_the_run_from_folders(
    s3: S3Server, tiny_t2i: Path, tiny_clip: Path, tmp_path: Path, run_job: Callable[..., JobRun]
) -> None:
    models = f"{s3.uri}/models-{os.getpid()}"
    for kind, folder in (("t2i", tiny_t2i), ("clip", tiny_clip)):
        staged = run_job("stage_models", f"--{kind}", folder, "--out", f"{models}/{kind}")
        assert staged.returncode == 0, staged.stderr
    corpus, cache = write_corpus(tmp_path), tmp_path / "cache"
    made = {}
    for name, t2i, clip in (("folders", tiny_t2i, tiny_clip), ("bucket", f"{models}/t2i", f"{models}/clip")):
        run = run_job(
            "generate", "--corpus", corpus, "--limit", 12, "--shard-size", 3, "--steps", 2, "--generators", 2,
            "--t2i", t2i, "--clip", clip, "--out", tmp_path / name, env={CACHE_VARIABLE: str(cache)},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        made[name] = run_job("verify", tmp_path / name).summary
        # One fetch of each, by the driver; its workers of this machine found the copy.
        assert run.stderr.count("fetching") == (2 if name == "bucket" else 0), run.stderr
    assert made["bucket"]["ok"] and made["bucket"]["fingerprint"] == made["folders"]["fingerprint"]
    spec = json.loads(open_store(tmp_path / "bucket").read_bytes("dataset.json"))["spec"]
    assert (spec["generator"]["model"], spec["clip"]["model"]) == (f"{models}/t2i", f"{models}/clip")
    assert str(cache).encode() not in open_store(tmp_path / "bucket").read_bytes("dataset.json")
