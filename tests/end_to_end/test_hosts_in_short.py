"""A cluster of several hosts, the quick sibling of test_hosts: hosts join one by one, and one is lost."""

from pathlib import Path

import pytest

from cluster.dataset.verify import verify
from cluster.store.store import open_store
from tests.helpers.hosts import can_make_hosts, several_hosts
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and the right to make namespaces")

#: One a shard: many enough that a host is lost in the middle.
CAPTIONS = [f"caption number {number}" for number in range(240)]


def test_a_host_joins_a_run_and_another_is_lost(tmp_path: Path) -> None:
    """The head draws nothing. The first host begins alone; the second joins, and the first is lost."""
    corpus = write_corpus(tmp_path, CAPTIONS)
    store, *_ = make_dataset_in_process(tmp_path / "undisturbed", corpus, null_spec(), shard_size=1)
    out = tmp_path / "data"

    with several_hosts(3) as hosts:
        head, one, two = hosts.hosts
        head.join(cpus=0, head=True)
        job = hosts.job(
            "jobs.generate", "--corpus", str(corpus), "--out", str(out), "--t2i", "null", "--shard-size", "1",
            "--generators", "2", "--device", "cpu",
        )  # fmt: skip
        one.join(cpus=1)
        two.join(cpus=1)
        wait_until(lambda: shards_stored(out) >= 3 or job.is_over(), seconds=300, said="no shards")
        one.lose()
        left = len(CAPTIONS) - shards_stored(out)
        summary = job.summary()
    assert left > 0, "all was drawn before the host was lost"
    report = verify(open_store(out))
    assert report["ok"] and summary["stored"] == len(CAPTIONS), report
    assert report["fingerprint"] == verify(store)["fingerprint"]
