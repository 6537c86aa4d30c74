"""A process on a GPU keeps to what it reserved; what its user said of the allocator stays."""

import os

import pytest

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
