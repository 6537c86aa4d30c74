"""Models are loaded through a hub's failures that pass, and through no others."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.session import start_ray
from cluster.store.retries import classify, load_with_retries
from pcm.errors import InputError
from tests.helpers.paths import ROOT

FILE = b'{"weights": "none"}'

#: Asks the hub at the address given for a file, by the hub's own client.
CLIENT = """
import logging, sys
from huggingface_hub import hf_hub_download
from cluster.store.retries import load_with_retries
from pcm.errors import InputError

logging.basicConfig(format="%(message)s", level=logging.WARNING)

def load():
    try:
        return hf_hub_download("a/model", "config.json", endpoint=sys.argv[1], cache_dir=sys.argv[2])
    except Exception as error:
        raise InputError("cannot be loaded") from error

print(open(load_with_retries(load, model="a/model")).read())
"""


class Hub(ThreadingHTTPServer):
    """A hub with one file, whose first answers are failures. Its client tries 503 again itself, some times."""

    daemon_threads = True

    def __init__(self, failures: list[int]) -> None:
        self.failures = failures
        super().__init__(("127.0.0.1", 0), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(FILE)

    def _answer(self, body: bytes) -> None:
        if self.server.failures:
            self.send_error(self.server.failures.pop(0))
            return
        self.send_response(200)
        for name, value in {"ETag": '"one"', "X-Repo-Commit": "a" * 40, "Content-Length": str(len(FILE))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(failures: list[int]) -> Iterator[Hub]:
    with Hub(failures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Hub, folder: object) -> subprocess.CompletedProcess[str]:
    host, port = server.server_address[:2]
    return subprocess.run(
        [sys.executable, "-c", CLIENT, f"http://{host!s}:{port}", str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PCM_STORE_RETRY_SECONDS": "60"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_hub_that_fails_twice_is_asked_again(tmp_path):
    with hub([520, 520]) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == FILE.decode(), done.stderr
    assert "a/model: not loaded (HTTP 520)" in done.stderr and "trying again for up to 1 min 00 s" in done.stderr


def test_a_file_that_is_not_there_is_not_waited_for(tmp_path):
    with hub([404, 404, 404]) as server:
        done = ask(server, tmp_path)
    assert done.returncode == 1 and "InputError: cannot be loaded" in done.stderr
    assert "trying again" not in done.stderr


def test_a_hub_that_may_not_be_asked_is_not_waited_for():
    from huggingface_hub.errors import OfflineModeIsEnabled

    error = InputError("cannot be loaded")
    error.__cause__ = OfflineModeIsEnabled("offline")
    assert classify(error).kind == "other"


def test_the_last_failure_is_told_when_the_time_is_over(monkeypatch):
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0.5")
    tried = []

    def load() -> None:
        tried.append(1)
        raise InputError("cannot be loaded") from ConnectionResetError(104, "reset")

    with pytest.raises(InputError, match="cannot be loaded"):
        load_with_retries(load, model="a/model")
    assert len(tried) > 1


def test_ray_data_ends_no_run_for_being_slow(ray_session):
    from ray.data import DataContext

    start_ray()
    assert DataContext.get_current().execution_no_progress_timeout_s == -1
