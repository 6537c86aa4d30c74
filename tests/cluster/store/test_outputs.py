"""Places that cannot hold what a job makes, and names that fsspec would read in another way."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.dataset.keys import shard_key
from cluster.store.outputs import check_output, refuse_other_things
from cluster.store.reach import marker
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.job_runs import JobRun
from tests.helpers.tiny_generation import null_spec, plan_dataset, write_corpus


def said_of(uri: object, kind: str = "folder") -> str:
    with pytest.raises(InputError) as caught:
        check_output(str(uri), kind, shown="--out")  # type: ignore[arg-type]
    assert str(caught.value).startswith("--out ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_place_where_something_stands_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a file; give a folder" in said_of(tmp_path / "file")
    assert "link that leads nowhere" in said_of(tmp_path / "link")
    assert "link that leads nowhere" in said_of(tmp_path / "link/run")
    assert f"{tmp_path}/file is a file, not a folder" in said_of(tmp_path / "file/run/one")
    assert "is a file, not a folder" in said_of(tmp_path / "file/report.html", "file")
    (tmp_path / "good").symlink_to(tmp_path)
    for place in (tmp_path / "new/deep", tmp_path / "good/new", tmp_path, "s3://bucket/prefix"):
        check_output(str(place), "folder", shown="--out")
    check_output(str(tmp_path / "file"), "file", shown="--out")
    assert "is a folder; give a file in it" in said_of(tmp_path / "good", "file")


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for place in (tmp_path / "pipe", tmp_path / "link", "/dev/null", "/dev/stdout"):
        if not Path(os.path.realpath(place)).is_file():  # a test's standard output may be one
            assert "is a device or a pipe, no file; give a file" in said_of(place, "file")


def test_a_mounted_file_is_refused(tmp_path: Path) -> None:
    for name in ("here", "a report.html"):
        (tmp_path / name).write_text("")
    place = tmp_path / "a report.html"
    if subprocess.run(["mount", "--bind", tmp_path / "here", place], capture_output=True).returncode:
        pytest.skip("may not mount a file")
    try:
        assert "is a mounted file, which cannot be replaced; mount its folder" in said_of(place, "file")
    finally:
        subprocess.run(["umount", place], check=True)
    check_output(str(place), "file", shown="--out")


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "link.html").symlink_to("report.html")
    check_output(str(tmp_path / "link.html"), "file", shown="--out")
    open_store(tmp_path / "link.html").write_bytes("", b"new")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "report.html").read_text() == "new"


def test_a_link_in_a_folder_is_replaced_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("of another dataset")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shard").symlink_to(tmp_path / "shard")
    open_store(tmp_path / "data").write_bytes("shard", b"mine")
    assert (tmp_path / "data/shard").read_text() == "mine" and (tmp_path / "shard").read_text() == "of another dataset"


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "снег" * 31 + ".json"])
def test_a_name_may_be_as_long_as_a_disk_takes_it(name: str, tmp_path: Path) -> None:
    check_output(str(tmp_path / name), "file", shown="--out")
    open_store(tmp_path / name).write_bytes("", b"1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    for place, kind in ((f"{name}xxx", "file"), (f"{name}xxx", "folder"), (f"{name}xxx/run", "folder")):
        assert "is longer than 255 bytes; shorten it" in said_of(tmp_path / place, kind)


def test_a_place_where_the_user_may_not_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "captions.json").write_text("")
    monkeypatch.setattr("os.access", lambda place, mode: False)  # root may everywhere
    for name, kind in (("new/deep", "folder"), ("new.json", "file"), ("captions.json", "file")):
        assert f"nothing can be written in {tmp_path}; check its owner" in said_of(tmp_path / name, kind)
    check_output(str(tmp_path / "run"), "folder", shown="--out")  # where a finished job may write nothing


@pytest.mark.parametrize("uri", ["https://host/run", "http://host/run", "memory://run", "simplecache::s3://bucket/run"])
def test_a_protocol_that_keeps_nothing_is_refused(uri: str) -> None:
    assert "give a local path, s3://" in said_of(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/a::b", "file:///tmp/a::b", "s3://one/a::s3://two/b", "https://host/a::b"])
def test_a_uri_that_fsspec_would_cut_at_a_double_colon_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="takes '::' for a chain"):
        open_store(uri)


@pytest.mark.parametrize("name", ["a::b", "file:x", "{x}", "x[1]*", "50%20", "a b", "#1"])
def test_a_path_goes_where_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in (name, f"{tmp_path}/absolute/{name}"):
        open_store(root).write_bytes("k", b"1")
        assert (tmp_path / root / "k").read_bytes() == b"1" and open_store(root).list() == ["k"]
        assert open_store(f"{root}/k").read_bytes("") == b"1"


@pytest.mark.parametrize("key", ["dataset.json", shard_key(0), "stats/part-000000.json", "config.json", "a/photo.jpg"])
def test_a_dataset_is_not_begun_among_other_things(key: str, tmp_path: Path, call_job: Callable[..., JobRun]) -> None:
    place = tmp_path / "out" / key
    place.parent.mkdir(parents=True)
    place.write_bytes(b"somebody else's")
    said = f"not empty and no dataset that was begun here (no plan.json): it holds {key}; give an empty place"
    corpus = write_corpus(tmp_path)
    with pytest.raises(InputError, match=re.escape(said)):
        plan_dataset(tmp_path / "out", corpus, null_spec())
    ended = call_job("generate", "--corpus", corpus, "--t2i", "null", "--clip", "null", "--out", tmp_path / "out")
    assert ended.returncode == 2 and said in ended.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [place.name]


def test_what_a_killed_job_has_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A file that all nodes should see, and parts of a plan that was not finished."""
    store = open_store(tmp_path / "out")
    with marker(store) as (_, seen):
        left = (tmp_path / "out" / seen).read_bytes()
    store.write_bytes(seen, left)
    refuse_other_things(store, "no export")
    store.write_bytes("plan/0/part-000000.parquet", b"")
    assert plan_dataset(tmp_path / "out", write_corpus(tmp_path), null_spec())[1].records
    with pytest.raises(InputError, match=r"out: not empty and no export: it holds plan"):
        refuse_other_things(store, "no export")


def test_outputs_besides_out_are_checked_before_the_job_begins(tmp_path: Path, call_job) -> None:
    (tmp_path / "file").write_text("")
    for job, *given, said in (
        ("generate", "--out", tmp_path, "--only", "000000001-00", "--image-out", tmp_path, "--image-out"),
        ("demo", "--out", tmp_path / "file", "--out"),
        ("pretrain_embedded", "--out", tmp_path / "file", "--out"),
    ):
        run = call_job(job, *given)
        assert run.returncode == 2 and run.stderr.startswith(f"error: {said} {tmp_path}")
        assert ": is a f" in run.stderr and run.stderr.count("\n") == 1


OUTS = {
    "generate": ["--corpus", "{captions}", "--t2i", "null"],
    "featurise": ["--images", "{folder}", "--captions", "{captions}"],
    "import_official": ["--vocabulary", "{captions}", "--clip", "embedded", "--annotations", "x", "--images", "y"],
    "train": ["--data", "{folder}"],
    "stream": ["--corpus", "{captions}"],
    "sweep": ["--data", "{folder}", "--param", "tau=0.1,0.2", "--trials", "2"],
    "evaluate": ["--results", "{captions}", "--references", "{captions}"],
    "caption": ["--checkpoint", "{folder}", "{captions}"],
    "export": ["--data", "{folder}", "--to", "webdataset"],
    "report": ["--data", "{folder}"],
}


@pytest.mark.parametrize("job", OUTS)
def test_every_job_refuses_such_a_place_before_it_begins(job: str, tmp_path: Path, call_job) -> None:
    captions = write_corpus(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    given = [text.format(captions=captions, folder=tmp_path) for text in OUTS[job]]
    for out in (captions / "run", tmp_path / "link" / "run", "https://host/run", "memory://run", "s3://bucket/a::b"):
        run = call_job(job, *given, "--out", out)
        assert run.returncode == 2, run.stderr
        assert str(out) in run.stderr and "Traceback" not in run.stderr and run.stderr.count("\n") == 1
