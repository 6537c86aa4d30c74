"""A process on a GPU keeps to what it reserved; what its user said of the allocator stays; a task's ends with it."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray
import torch

from cluster.dataset.vocabularies import run_with_clip
from cluster.evaluation import caption
from cluster.evaluation.caption import _captions_of_worker
from cluster.evaluation.captioners import device_here
from cluster.evaluation.request import CaptionRequest
from cluster.generation import redraw_check
from cluster.generation.capacity import Result, with_generator_resources
from cluster.generation.pools import Pools
from cluster.gpu_share import ALLOCATOR, gpu_share, gpu_task, keep_to_gpu_share
from pcm.spec import ClipSpec
from tests.helpers.ray_gpu import ray_told_of_a_gpu
from tests.helpers.waiting import wait_until


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_the_allocator_extends_its_segments_on_a_gpu_alone() -> None:
    keep_to_gpu_share("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    keep_to_gpu_share("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == ALLOCATOR


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    keep_to_gpu_share("cuda")
    assert os.environ[name] == "max_split_size_mb:128"
    assert len({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)) == 1


def test_outside_of_ray_nothing_is_reserved() -> None:
    assert gpu_share() == 0.0


@pytest.fixture(scope="module")
def ray_with_a_gpu() -> Iterator[None]:
    """Ray with one GPU by its own account, whatever there is."""
    with ray_told_of_a_gpu(num_cpus=1):
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no GPU that torch does not find")
def test_a_worker_with_a_gpu_that_torch_does_not_find_says_that_it_captions_on_the_cpu(ray_with_a_gpu: None) -> None:
    @ray.remote(num_cpus=0)
    def said(asked: str) -> tuple[str, list[str]]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("cluster.gpu_share").addHandler(handler)
        return device_here(asked), lines

    device, (line,) = ray.get(said.options(num_gpus=0.5).remote("auto"))
    assert device == "cpu" and "captioning on the CPU" in line
    assert ray.get(said.options(num_gpus=0.5).remote("cpu")) == ("cpu", [])


def test_a_worker_that_reserved_no_gpu_takes_none_of_those_that_it_sees(ray_with_a_gpu: None) -> None:
    """Ray hides no GPU from a worker that has none."""

    @ray.remote(num_cpus=0)
    def device() -> str:
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            ThreadPoolExecutor(1) as thread,  # as Ray Train's function
        ):
            return thread.submit(device_here, "auto").result()

    assert ray.get(device.remote()) == "cpu"
    assert ray.get(device.options(num_gpus=0.5).remote()) == "auto"


ON_A_GPU = Pools.for_cluster(device="cuda", cpus=1, gpus=1)


def pid_of_a_measurement(folder: Path) -> int:
    def work() -> Iterator[str | Result[int]]:
        yield "loading the model"
        yield Result(os.getpid())

    return with_generator_resources(work, ON_A_GPU, what="speed")


def pid_of_a_redraw(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redraw_check, "pools_of_cluster", lambda *, device: ON_A_GPU)
        patch.setattr(redraw_check, "draw_again", lambda store, spec, rows: ([b""], {"pid": os.getpid()}))
        spec: Any = SimpleNamespace(generator=SimpleNamespace(device="cuda"))
        ((_, found),) = redraw_check._on_ray([(SimpleNamespace(store=None), spec, None)])  # type: ignore[list-item]
    return found["pid"]


def pid_of_concepts(folder: Path) -> int:
    run_with_clip(
        lambda: (folder / "pid").write_text(f"{os.getpid()}"), clip=ClipSpec(model="any", revision="", device="cuda")
    )
    return int((folder / "pid").read_text())


def pid_of_captions(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption, "check_checkpoint", lambda uri: None)
        patch.setattr(caption, "_captions_on_gpu", lambda request: {"pid": os.getpid()})
        found: Any = _captions_of_worker(CaptionRequest(images=("one.png",), checkpoint="run", gpus_per_worker=1))
    return found["pid"]


@pytest.mark.parametrize("work", [pid_of_a_measurement, pid_of_a_redraw, pid_of_concepts, pid_of_captions])
def test_the_process_of_a_task_with_a_gpu_ends_with_it(
    work: Callable[[Path], int], tmp_path: Path, ray_with_a_gpu: None
) -> None:
    """What it holds of the GPU would be beside the generator that has that GPU next."""
    pid = work(tmp_path)
    assert pid != os.getpid()
    wait_until(lambda: has_ended(pid), said="its process goes on")


def test_the_process_of_a_task_without_a_gpu_does_the_next_one_too(ray_with_a_gpu: None) -> None:
    task = gpu_task(lambda: os.getpid(), num_cpus=1, num_gpus=0)
    assert ray.get(task.remote()) == ray.get(task.remote())


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
