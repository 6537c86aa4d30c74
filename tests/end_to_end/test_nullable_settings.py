"""A dataset whose spec has every setting unset that may be unset: the jobs take it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.dataset.keys import MANIFEST_KEY
from cluster.generation.like import read_spec_manifest, with_spec
from cluster.generation.pinning import dataset_spec
from cluster.generation.request import GenerateRequest
from cluster.store.store import open_store
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from tests.cluster.dataset.test_view import make_view
from tests.helpers.job_runs import JobRun
from tests.helpers.page_reader import Page
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, write_corpus
from tests.helpers.tiny_pipelines import save_pipeline

SMALL = {"steps": 1, "width": 32, "height": 32}


def nullable(kind: type[GeneratorSpec] | type[ClipSpec]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind) if "None" in str(entry.type)}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> GenerateRequest:
    """Of a pipeline whose own guidance scale is None: diffusers' Qwen-Image."""
    folder = tmp_path_factory.mktemp("nullable")
    model = save_pipeline("qwen_image", folder / "model")
    corpus = write_corpus(folder, CAPTIONS[:3])
    return GenerateRequest(
        corpus=str(corpus), out=str(folder / "data"), t2i=str(model), clip=str(tiny_clip), device="cpu", **SMALL
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def spec(asked: GenerateRequest) -> DatasetSpec:
    return dataset_spec(asked, gpus=0)


@pytest.fixture(scope="module")
def data(asked: GenerateRequest, spec: DatasetSpec) -> Path:
    make_dataset_in_process(asked.out, Path(str(asked.corpus)), spec, shard_size=2)
    make_view(Path(asked.out).parent / "view", [Path(asked.out)], [(0, 0), (0, 2)])
    return Path(asked.out)


def test_all_that_may_be_unset_is(spec: DatasetSpec) -> None:
    """But for the size of the pictures, which makes them small: no job shows it."""
    for part in (spec.generator, spec.clip):
        assert {name for name in nullable(type(part)) if getattr(part, name) is not None} <= {"width", "height"}


@pytest.mark.parametrize("name", ["data", "view"])
@pytest.mark.parametrize(
    "job",
    [
        ("report", "--data", "{data}", "--out", "{out}.html"),
        ("verify", "{data}"),
        ("export", "--data", "{data}", "--to", "webdataset", "--out", "{out}"),
        ("export", "--data", "{data}", "--to", "huggingface", "--out", "{out}"),
        ("curate", "--data", "{data}", "--subset", "1", "--out", "{out}"),
    ],
    ids=lambda job: " ".join(job[:1] + job[4:5]),
)
def test_jobs_take_it(
    data: Path, name: str, job: tuple[str, ...], tmp_path: Path, call_job: Callable[..., JobRun]
) -> None:
    ended = call_job(*(part.format(data=data.parent / name, out=tmp_path / "out") for part in job))
    assert ended.returncode == 0, ended.stderr


def test_the_report_says_that_the_guidance_is_the_pipelines_own(
    data: Path, tmp_path: Path, call_job: Callable[..., JobRun]
) -> None:
    assert call_job("report", "--data", data, "--out", tmp_path / "report.html").returncode == 0
    assert "1 steps, the pipeline's own guidance" in Page((tmp_path / "report.html").read_text()).text


def test_it_can_be_drawn_like_another(data: Path, asked: GenerateRequest, spec: DatasetSpec) -> None:
    like = GenerateRequest(corpus=asked.corpus, out="out", spec=f"{open_store(data).root}/{MANIFEST_KEY}")
    assert like.spec is not None
    assert dataset_spec(with_spec(like, read_spec_manifest(like.spec).spec), gpus=0) == spec
