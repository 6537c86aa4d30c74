"""The task of Ray that loads CLIP for a dataset's concepts: a queue is said, and so is what a user did wrong."""

import threading
from pathlib import Path

import pytest
import ray

from cluster.dataset.vocabularies import run_with_clip
from cluster.session import free_room
from pcm.errors import InputError
from pcm.spec import ClipSpec
from tests.helpers.waiting import Holds, wait_until

CLIP = ClipSpec(model="null", revision="")


def test_what_the_task_waits_for_is_said(ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cluster.session")
    holder = ray.remote(Holds).options(num_cpus=2).remote()
    ray.get(holder.ready.remote())
    wait_until(lambda: free_room(cpus=1, gpus=0) == 0, seconds=60, said="the actor has not both CPUs")

    def release() -> None:
        wait_until(lambda: "waiting for 1 CPUs and 0 GPUs" in caplog.text, seconds=60, said="no line")
        ray.kill(holder)

    releasing = threading.Thread(target=release)
    releasing.start()
    run_with_clip(lambda place: place.write_text("done"), tmp_path / "done", clip=CLIP)
    releasing.join()
    assert (tmp_path / "done").read_text() == "done"
    assert "waiting for 1 CPUs and 0 GPUs; the cluster has 2 and 0 now, of which 0 and 0 are free" in caplog.text


def test_a_users_error_in_the_task_is_raised_as_it_is(ray_session: None) -> None:
    def refuse() -> None:
        raise InputError("no such CLIP")

    with pytest.raises(InputError, match=r"^no such CLIP$"):
        run_with_clip(refuse, clip=CLIP)
