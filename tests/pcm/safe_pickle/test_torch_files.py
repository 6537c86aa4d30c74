"""A torch file takes no more memory than it has bytes."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from pcm.errors import InputError
from pcm.official.state_dict import read_tensors
from pcm.safe_pickle import reader as safe_pickle
from pcm.safe_pickle.torch_files import check_archive, load_torch


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as smaller,
    ):
        for member in archive.infolist():
            smaller.writestr(member.filename, archive.read(member))
    return buffer.getvalue()


def test_what_torch_save_writes_is_read() -> None:
    content = {"model": {"a": torch.arange(6).reshape(2, 3), "b": torch.arange(6).reshape(2, 3).T}}
    read = load_torch(io.BytesIO(saved(content)))
    assert all(torch.equal(read["model"][name], content["model"][name]) for name in "ab")


@pytest.mark.parametrize("read", [safe_pickle.load, read_tensors, check_archive])
def test_a_file_that_inflates_is_refused_before_it_is_read(read, tmp_path: Path) -> None:
    small = compressed(saved({"model": {"a": torch.zeros(1 << 20)}}))
    assert len(small) < 20_000
    (tmp_path / "model.pth").write_bytes(small)
    with pytest.raises(InputError, match=r"bytes that stand for 4,\d{3},\d{3}"):
        read(tmp_path / "model.pth")


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(1 << 30), torch.sparse_coo_tensor(size=(1 << 20, 1 << 20))])
def test_a_tensor_larger_than_its_values_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(saved({"model": {"a": tensor}}))
    with pytest.raises(InputError, match="larger than its values"):
        read_tensors(tmp_path / "model.pth")
