"""Every job keeps the contract of the command line: help, one-line errors, exit status, --config, one JSON line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.options import Request, flag, option, options_of
from cluster.training.config import TRAINING_PRESETS, TrainConfig
from cluster.training.request import TrainRequest
from jobs.__main__ import job_names, load_job, main
from jobs.command_line import Job
from pcm.errors import InputError
from tests.helpers.paths import ROOT

JOBS = job_names()


@dataclass(frozen=True, kw_only=True)
class Example(Request):
    """An example."""

    number: int = option(3, help="how many")
    share: float | None = option(None, help="of all", unset="what fits")
    kind: str = option("plain", choices=("plain", "fancy"), help="of what kind")
    names: tuple[str, ...] = option((), flag="name", help="of whom")
    labels: Mapping[str, str] = option(
        {}, flag="label", metavar="NAME=VALUE", parse=lambda text: tuple(text.split("=", 1)), help="of nodes"
    )
    loud: bool = option(False, help="say it")


def example(run=dataclasses.asdict) -> Job:
    return Job("example", "An example.", Example, run)


def refused(capsys: pytest.CaptureFixture, job: Job, *arguments: object) -> str:
    """The one line of a usage error."""
    with pytest.raises(SystemExit) as end:
        job.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# --- every job ---


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == ""
    assert out.startswith(f"usage: python -m jobs.{name}")
    assert load_job(name).summary in out, "the help says what the job does"


@pytest.mark.parametrize("name", JOBS)
def test_every_option_has_a_text_and_a_default(name: str) -> None:
    job = load_job(name)
    lines = job.help()
    text = "".join(lines.split())  # without the line breaks, which may be within a word
    for field, described in options_of(job.request).items():
        assert flag(job.request, field) in lines
        said = "".join(described.help.split())
        assert said and (f"{said}(default:" in text or f"{said}(required" in text), f"{field}: no text or no default"


def test_help_promises_nothing_that_is_refused() -> None:
    assert "--num-workers N " in load_job("stream").help()
    assert "CLIPScore" not in load_job("caption").help()


@pytest.mark.parametrize("name", JOBS)
def test_every_output_is_checked_before_the_job_begins(name: str) -> None:
    request = load_job(name).request
    outputs = {field: described for field, described in options_of(request).items() if re.search("(^|_)out$", field)}
    assert outputs or name == "verify"
    assert [field for field, described in outputs.items() if described.writes is None] == []


@pytest.mark.parametrize("name", JOBS)
def test_every_job_refuses_an_unknown_argument_in_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    assert "--no-such-argument: not known" in refused(capsys, load_job(name), "--no-such-argument", "x")


@pytest.mark.parametrize("name", JOBS)
def test_a_misspelt_option_is_answered_with_the_right_one(name: str, capsys: pytest.CaptureFixture) -> None:
    job = load_job(name)
    known = next(shown for field in options_of(job.request) if (shown := flag(job.request, field)).startswith("--"))
    misspelt = known[:-1] + "x" + known[-1]
    assert f"{misspelt}: not known; did you mean {known}?" in refused(capsys, job, misspelt, "1")


@pytest.mark.parametrize("name", JOBS)
def test_every_job_takes_a_config_and_refuses_a_key_that_it_does_not_know(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "job.yaml").write_text("no_such_option: 1\n")
    assert "'no_such_option' is not known" in refused(capsys, load_job(name), "--config", tmp_path / "job.yaml")


def test_help_loads_neither_torch_nor_ray_nor_arrow() -> None:
    code = """
import contextlib, io, sys
from jobs.__main__ import job_names, main
with contextlib.redirect_stdout(io.StringIO()):
    main([])
    for name in job_names():
        try:
            main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "pyarrow", "open_clip", "diffusers"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_jobs_of_the_contract_are_there() -> None:
    contract = {"generate", "verify", "featurise", "train", "stream", "sweep", "evaluate", "caption", "export"}
    assert contract | {"import_official", "refine", "report", "demo"} <= set(JOBS)


def test_the_jobs_are_listed_with_a_line_each(capsys: pytest.CaptureFixture) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    for name in JOBS:
        assert any(line.split()[:1] == [name] and load_job(name).summary in line for line in lines)


def test_a_misspelt_job_is_answered_with_the_right_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["genrate", "--out", "x"])
    assert end.value.code == 2
    assert "error: job 'genrate': not known; did you mean 'generate'?" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--no"], 2), (["/no/such/dataset"], 2)])
def test_a_process_ends_with_the_status_of_the_contract(arguments: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.verify", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr and (status == 0 or done.stderr.count("\n") == 1)


def test_no_job_imports_another() -> None:
    for name in JOBS:
        source = (ROOT / "jobs" / f"{name}.py").read_text()
        imported = set(re.findall(r"(?:from|import) jobs\.(\w+)", source))
        assert imported - {"endings"} == {"command_line"}, name  # which is no job either


# --- from a request to a command line ---


def test_a_summary_is_one_json_line_and_numbers_in_it_are_numbers(capsys: pytest.CaptureFixture) -> None:
    example(lambda asked: {"number": asked.number, "text": "çà"}).main(["--number", "5"])
    assert json.loads(capsys.readouterr().out) == {"number": 5, "text": "çà"}
    with pytest.raises(ValueError, match="JSON"):
        example(lambda asked: {"number": float("nan")}).main([])


def test_an_input_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    def run(asked: Example) -> dict:
        raise InputError("the value,\n  what is allowed")

    assert refused(capsys, example(run)) == "error: the value, what is allowed\n"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PCM_LOG_LEVEL", "loud", "PCM_LOG_LEVEL 'loud': not known; allowed are CRITICAL, FATAL"),
        ("PCM_STORE_RETRY_SECONDS", "5m", "PCM_STORE_RETRY_SECONDS 5m: must be a number of seconds"),
        ("PCM_STORE_RETRY_SECONDS", "nan", "PCM_STORE_RETRY_SECONDS nan: must be a number of seconds"),
    ],
)
def test_a_variable_that_cannot_be_is_one_line(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    assert said in refused(capsys, example())


def test_a_log_level_may_be_in_small_letters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PCM_LOG_LEVEL", "debug")
    example().main([])
    assert json.loads(capsys.readouterr().out)["number"] == 3


def test_a_log_line_of_a_job_or_of_its_workers_has_its_date_and_time_zone() -> None:
    code = """
import logging
from cluster.training.worker import _log_to_stderr
from jobs.command_line import set_up_logging
set_up_logging()
logging.getLogger("cluster.x").info("a job's")
_log_to_stderr()
logging.getLogger("cluster.x").info("a worker's")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TZ": "Asia/Kolkata"}
    )
    when = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+0530"
    assert re.fullmatch(rf"{when} cluster\.x: a job's\n{when} a worker's\n", done.stderr), done.stderr


def test_a_check_that_fails_prints_its_summary_and_ends_with_1(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        example(lambda asked: {"ok": False}).main([])
    assert end.value.code == 1 and json.loads(capsys.readouterr().out) == {"ok": False}


def test_what_is_given_reaches_the_request() -> None:
    asked = example().read(
        ["--number", "5", "--share=0.5", "--kind", "fancy", "--name", "a", "--name", "b", "--label", "x=1", "--loud"]
    )
    assert asked == Example(number=5, share=0.5, kind="fancy", names=("a", "b"), labels={"x": "1"}, loud=True)
    assert example().read([]) == Example()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num", "5"], "--num: not known"),
        (["--number"], "--number: expected one argument"),
        (["--number", "five"], "--number five: must be a whole number"),
        (["--share", "half"], "--share half: must be a number"),
        (["--kind", "fanzy"], "--kind 'fanzy': not known; did you mean 'fancy'? allowed are plain, fancy"),
        (["--label", "x=1", "--label", "x=2"], "--label x: is given twice"),
        (["stray"], "stray: not known"),
        (["--number", "1", "--kind", "fancy", "--number", "1"], "--number: is given twice; give it once"),
        (["--loud", "--no-loud"], "--loud or --no-loud: is given twice; give it once"),
        (["--config", "a", "--config", "b"], "--config: is given twice; give it once"),
        (["--ki", "1"], "--ki: not known; did you mean --kind?"),
        (["--lr", "1"], "--lr: not known (see"),  # nothing is like it but for the hyphens
    ],
)
def test_what_cannot_be_read_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in refused(capsys, example(), *arguments)


def test_what_is_required_is_asked_for_all_at_once(capsys: pytest.CaptureFixture) -> None:
    assert "error: --data, --out: missing" in refused(capsys, load_job("train"))


def test_files_and_options_of_caption_come_in_any_order() -> None:
    asked = load_job("caption").read(["a.jpg", "--checkpoint", "run", "b.jpg", "--beam-size", "1", "c.jpg"])
    assert (asked.images, asked.checkpoints, asked.beam_size) == (("a.jpg", "b.jpg", "c.jpg"), ("run",), 1)


# --- --config ---


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
def test_a_config_is_read_as_the_command_line_is_and_the_command_line_wins(write: Any, tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text(
        write({"number": 7, "share": 1e-8, "names": ["a"], "label": {"x": "1", "y": 2}, "loud": True, "kind": None})
    )
    expected = Example(number=7, share=1e-8, names=("a",), labels={"x": "1", "y": "2"}, loud=True)
    assert example().read(["--config", str(file)]) == expected
    given = ["--number", "1", "--name", "b", "--label", "y=3", "--no-loud"]
    assert example().read(["--config", str(file), *given]) == Example(
        number=1, share=1e-8, names=("b",), labels={"x": "1", "y": "3"}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("numer: 3", "'numer' is not known; did you mean 'number'?"),
        ("number: 2.5", "number 2.5: must be a whole number"),
        ("number: true", "number true: must be a whole number"),
        ("number: [1, 2]", "number 1 2: takes one value"),
        ("loud: 1", "loud '1': must be true or false"),
        ("kind: fanzy", "did you mean 'fancy'?"),
        ("- number", "must hold NAME: value"),
        ("{number: ", "neither JSON nor YAML"),
        ("number: 1\nloud: true\nnumber: 2", "config.yaml: 'number' is given twice; give it once"),
        ('{"number": 1, "number": 2}', "config.yaml: 'number' is given twice; give it once"),
        ("label: {x: 1, x: 2}", "config.yaml: 'x' is given twice; give it once"),
        ("name: [a]\nnames: [b]", "'names' is given twice, under two names; give it once"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert said in refused(capsys, example(), "--config", tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["set: {top_concepts: 3}", "set: top_concepts=3", "set: [top_concepts=3]"])
def test_settings_of_a_config_are_a_mapping_or_written_as_on_the_command_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{text}\ntau: 0.5\n")
    asked = load_job("train").read(["--config", str(tmp_path / "config.yaml"), "--data", "a", "--out", "b"])
    assert asked.overrides == {"top_concepts": 3, "tau": 0.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set: 3", "--config: set 3: must be a mapping, or a text FIELD=VALUE"),
        ("overrides: [{tau: 1}]", "--config: set [{'tau': 1}]: must be a mapping"),
        ("set: top_concepts", "write FIELD=VALUE, such as top_concepts=3"),
        ("set: [tau=1, tau=2]", "--config: set tau: is given twice; give it once"),
    ],
)
def test_settings_of_a_config_that_cannot_be_read_are_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert said in refused(capsys, load_job("train"), "--config", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [("batchsize: 3", "'batchsize' is not known; did you mean 'batch_size'?"), ("zzzz: 3", "set, epochs, ")],
)
def test_a_config_of_training_is_helped_to_the_settings_too(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    error = refused(capsys, load_job("train"), "--config", tmp_path / "config.yaml")
    assert said in error and ("did you mean" in error or "top_concepts" in error)


def test_overrides_under_both_names_in_a_config_are_refused(tmp_path: Path) -> None:
    values = {"data": "a", "out": "b", "set": {"batch_size": 16}, "overrides": {"word_dropout": 0.1}}
    with pytest.raises(InputError, match="'overrides' and 'set' are one option; give it once"):
        TrainRequest.file_fields(values)


def test_a_config_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no such file" in refused(capsys, example(), "--config", "nowhere.yaml")
    assert f"{tmp_path}: is a folder; give a file" in refused(capsys, example(), "--config", tmp_path)


def test_command_line_over_set_over_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: [A, B=0.5]\nout: run\nepochs: 3\nset: {tau: 0.5, top_concepts: 2}\nbatch_size: 8\n")
    read = load_job("train").read
    asked = read(["--config", str(file)])
    assert (asked.data, asked.out) == (("A", "B=0.5"), "run")
    assert asked.settings == {"epochs": 3, "batch_size": 8, "tau": 0.5, "top_concepts": 2}
    assert read(["--config", str(file), "--set", "epochs=4", "--set", "tau=1.0"]).settings["epochs"] == 4
    both = read(["--config", str(file), "--set", "epochs=4", "--epochs", "5", "--data", "C"])
    assert (both.settings["epochs"], both.settings["tau"], both.data) == (5, 0.5, ("C",))


def test_a_config_means_the_home_folder_by_a_tilde_as_the_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    file = tmp_path / "config.yaml"
    file.write_text("names: [~/models/clip, a~/b, '~']\nlabel: {x: ~/y, ~/z: 1}")
    read = example().read(["--config", str(file)])
    assert read.names == ("/home/ann/models/clip", "a~/b", "~") and read.labels == {
        "x": "/home/ann/y",
        "/home/ann/z": "1",
    }


@pytest.mark.parametrize("name", ["train", "sweep", "stream"])
def test_a_training_config_as_json_is_a_config_of_every_training_job(name: str, tmp_path: Path) -> None:
    """A sweep's best.json is one: everything but the dataset's sizes, and in a stream what is decided elsewhere."""
    config = TRAINING_PRESETS["embedded"].with_overrides({"tau": 0.5, "adam_eps": 1e-9, "batch_size": 16, "seed": 7})
    (tmp_path / "best.json").write_text(json.dumps(config.to_dict()))
    arguments = {"train": ["--data", "A"], "sweep": ["--data", "A", "--trials", "2"], "stream": ["--corpus", "c.txt"]}
    asked = load_job(name).read(["--config", str(tmp_path / "best.json"), "--out", "run", *arguments[name]])
    made = TrainConfig().with_overrides(asked.settings)
    differences = made.differences(config)
    assert set(differences) == ({"seed"} if name == "stream" else set())
    if name == "stream":
        assert (asked.batch_size, asked.training.settings["batch_size"], asked.training.seed) == (8, 16, 0)


def test_a_name_that_generation_and_training_share_is_generations_in_a_stream(tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_text("corpus: c.txt\nout: both\nbatch_size: 4\nseed: 3\nlr_factor: 0.5\n")
    asked = load_job("stream").read(["--config", str(tmp_path / "stream.yaml")])
    assert (asked.batch_size, asked.seed) == (4, 3)
    assert asked.training.settings == {"lr_factor": 0.5, "seed": 3}
    assert (asked.dataset, asked.training.out) == ("both/dataset", "both/run")


# --- refused before anything is begun ---


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --data A --out B --preset coco_l1", "did you mean 'coco_l14'?"),
        ("train --data A --out B --set top_concept=3", "did you mean 'top_concepts'?"),
        ("train --data A --out B --set nonsense=3", "concept_threshold"),
        ("train --data A --out B --set vocab_size=3", "comes from the dataset"),
        ("train --data A --out B --set tau=x", "must be of type float"),
        ("train --data A --out B --batch-size 16", "--batch-size: not known; it is a setting: use --set batch_size="),
        ("train --data A=0 --out B", "a weight above 0"),
        ("train --data A --out B --val-references x", "--val-references x: needs --val-images"),
        ("train --data A --out B --num-workers 0", "--num-workers 0: write a number such as 8, or MIN:MAX such as 2:8"),
        ("train --data A --out B --worker-label spot", "write NAME=VALUE"),
        ("train --data /no/such/dataset --out B", "/no/such/dataset"),
        ("generate --out B", "--corpus: missing"),
        ("generate --out B --corpus /no/such.txt", "/no/such.txt: no such file"),
        ("generate --out B --corpus embedded --split nosplit", "no caption in split 'nosplit'"),
        ("generate --out B --corpus embedded --preset synthimgcap_coc", "did you mean 'synthimgcap_coco'?"),
        ("generate --out B --corpus embedded --t2i /no/such/t2i", "/no/such/t2i"),
        ("generate --out B --corpus embedded --clip ViT-Z/x", "ViT-Z"),
        ("generate --out B --corpus embedded --dtype float23", "did you mean 'float32'?"),
        ("generate --out B --corpus embedded --image-out x.png", "--image-out x.png: needs --only"),
        ("generate --out B --corpus embedded --spot", "--spot needs --price-per-hour"),
        ("generate --out B --corpus embedded --t2i null --stop-below-clip-score 0.2", "--clip null gives no scores"),
        ("generate --out B --only 000000001-00 --steps 3", "--steps: without effect beside --only"),
        ("generate --out B --only 000000001-00 --corpus embedded", "--corpus: without effect beside --only"),
        ("generate --out B --only 000000001-00", "not a dataset"),
        (
            "generate --out B --only 000000001-00 --image-out s3://b/x.png",
            "--image-out s3://b/x.png: must be a local file",
        ),
        (
            "generate --out B --retry-quarantined nan_image --seed 3",
            "--seed: without effect beside --retry-quarantined",
        ),
        ("generate --out B --corpus embedded --batch-timeout 0", "batch timeout 0"),
        ("generate --out B --corpus embedded --price-per-hour -1", "price per hour -1"),
        ("stream --out B --corpus /no/such.txt", "/no/such.txt: no such file"),
        ("stream --out B --corpus embedded --preset coco_l1", "did you mean 'coco_l14'?"),
        ("stream --out B --corpus embedded --preset coco_l14 --preset coco_b32", "give at most one of"),
        (
            "stream --out B --corpus embedded --num-workers 1:2",
            "--num-workers 1:2: a stream's workers are as many from its beginning",
        ),
        ("stream --out B --corpus embedded --set seed=3", "--seed sets that of both sides"),
        ("stream --out B --corpus embedded --preset embedded --set epochs=0", "must be at least 1"),
        ("sweep --data A --out B", "--search random: give --trials N"),
        ("sweep --data A --out B --trials 2 --param ta=1,2", "did you mean 'tau'?"),
        ("sweep --data A --out B --trials 2 --param tau=log:2:1", "needs LOW below HIGH"),
        ("sweep --data A --out B --ablation K --trials 3", "is a grid of its own"),
        ("sweep --data /no/such/dataset --out B --trials 2", "/no/such/dataset"),
        ("evaluate --checkpoint /no/such/run --images embedded:val", "/no/such/run"),
        ("evaluate --checkpoint /no/such/run --images embedded:val --num-workers 2", "/no/such/run"),
        ("evaluate --images embedded:val", "--checkpoint is missing"),
        ("evaluate --checkpoint A --images B --experiment coco_b23", "did you mean 'coco_b32'?"),
        ("evaluate --checkpoint A --images B --seed 3", "--seed 3: needs --shuffled-baseline"),
        ("evaluate --results r.json --references x --checkpoint A", "without effect beside --results"),
        (
            "evaluate --results r.json --references x --beam-size 5",
            "error: --beam-size: without effect beside",
        ),
        ("evaluate --results r.json --references x --device cpu", "error: --device: without effect beside"),
        ("evaluate --list-experiments --out B", "--out: without effect beside --list-experiments"),
        ("caption --checkpoint A", "IMAGE_OR_FOLDER: missing"),
        ("caption --checkpoint /no/such/run a.jpg", "/no/such/run"),
        ("export --data A --out B --to webdataset --run-on ray --workers 2", "--workers: threads of one process"),
        ("export --checkpoint A --out B --to official --run-on ray", "--run-on: is for a dataset"),
        ("verify A --corpus x", "--corpus x: needs --repair"),
        ("export --data A --out B --to webdatset", "did you mean 'webdataset'?"),
        ("export --data A --out B --to webdataset --name x", "--name: is for a dataset --to official"),
        ("generate --out B --corpus embedded --image-format png --image-quality 90", "without effect on PNG"),
        ("generate --out B --corpus embedded --t2i-revision main", "is no repo"),
        ("generate --out B --corpus embedded --clip-revision main", "is for a CLIP of the hub"),
        ("stream --out B --corpus embedded --t2i null", "--clip null: gives no features"),
        ("featurise --images A --captions B --out C --clip null", "--clip null"),
        ("import_official --out B --vocabulary v --clip c", "give one of the two"),
        (
            "import_official --out B --vocabulary v --clip c --annotations a --images i --clip-score-scale inf",
            "--clip-score-scale inf: must be a number above 0",
        ),
        (
            "import_official --out B --vocabulary v --clip c --checkpoint m --concepts c --set top_concept=3",
            "top_concepts",
        ),
        ("import_official --out B --vocabulary v --clip c --checkpoint m --concepts c --images i", "--images: without"),
        ("stage_models --out B", "--t2i, --clip: give one of the two, or both"),
        ("stage_models --out B --clip embedded", "needs no staging"),
        ("report --out B", "nothing to report on"),
        ("report --out B --data A --split test", "--split test: needs --images"),
        ("demo --captions 0", "--captions 0: must be at least 1"),
        ("pretrain_embedded --out B --scenes 3", "--scenes 3: must be at least 512"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_is_started_and_nothing_is_written(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import ray

    def started(*args: object, **settings: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(command.split())
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert end.value.code == 2 and out == "" and line.startswith("error: ") and said in line
    assert list(tmp_path.iterdir()) == []
