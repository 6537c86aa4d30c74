"""Every job keeps the contract of the command line: help, one-line errors, exit status, one JSON line."""

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import jobs
from jobs.cli import make_parser, run_job
from pcm.errors import InputError
from tests.helpers.paths import ROOT

SHARED = {"cli", "spec_arguments"}  # parts of jobs, not jobs
JOBS = sorted({module.name for module in pkgutil.iter_modules(jobs.__path__)} - SHARED)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    job = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as end:
        job.parser().parse_args(["--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == ""
    assert out.startswith(f"usage: python -m jobs.{name}")
    assert job.parser().description, "the help says what the job does"


@pytest.mark.parametrize("name", JOBS)
def test_every_job_refuses_an_unknown_argument_in_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    job = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as end:
        job.parser().parse_args(["--no-such-argument", "x"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_first_jobs_of_the_contract_are_there() -> None:
    assert {"generate", "verify", "train", "evaluate", "caption"} <= set(JOBS)


def parser() -> argparse.ArgumentParser:
    result = make_parser("example", "An example.")
    result.add_argument("--number", type=int, default=3)
    return result


def test_a_summary_is_one_json_line_and_numbers_in_it_are_numbers(capsys: pytest.CaptureFixture) -> None:
    run_job(parser(), lambda args: {"number": args.number, "text": "çà"}, ["--number", "5"])
    assert json.loads(capsys.readouterr().out) == {"number": 5, "text": "çà"}
    with pytest.raises(ValueError, match="JSON"):
        run_job(parser(), lambda args: {"number": float("nan")}, [])


def test_an_input_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    def run(args: argparse.Namespace) -> dict:
        raise InputError("the value,\n  what is allowed")

    with pytest.raises(SystemExit) as end:
        run_job(parser(), run, [])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err == "error: the value, what is allowed\n"


def test_a_check_that_fails_prints_its_summary_and_ends_with_1(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run_job(parser(), lambda args: {"ok": False}, [])
    assert end.value.code == 1 and json.loads(capsys.readouterr().out) == {"ok": False}


def test_arguments_are_not_abbreviated(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--num", "5"])
    assert "--num" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--no"], 2), (["/no/such/dataset"], 2)])
def test_a_process_ends_with_the_status_of_the_contract(arguments: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.verify", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr and (status == 0 or done.stderr.count("\n") == 1)
