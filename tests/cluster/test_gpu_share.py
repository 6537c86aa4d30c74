"""A process on a GPU keeps to what it reserved; what its user said of the allocator stays."""

import logging
import os

import pytest
import ray
import torch

from cluster.evaluation.captioning import _device_here
from cluster.gpu_share import ALLOCATOR, gpu_share, keep_to_gpu_share


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no GPU that torch does not find")
def test_a_worker_with_a_gpu_that_torch_does_not_find_says_that_it_captions_on_the_cpu() -> None:
    @ray.remote(num_cpus=0)
    def said(asked: str) -> tuple[str, list[str]]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("cluster.gpu_share").addHandler(handler)
        return _device_here(asked), lines

    ray.shutdown()  # that of other tests
    ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, logging_level=logging.WARNING)
    try:
        device, (line,) = ray.get(said.options(num_gpus=0.5).remote("auto"))
        assert device == "cpu" and "captioning on the CPU" in line
        assert ray.get(said.options(num_gpus=0.5).remote("cpu")) == ("cpu", [])
        assert ray.get(said.remote("auto")) == ("cpu", []), "Ray gave it none"
    finally:
        ray.shutdown()
