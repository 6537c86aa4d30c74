"""A real S3 store for tests: SeaweedFS on this machine, with an identity of its own."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec

from tests.helpers.ports import free_ports

BUCKET = "pcm-tests"  # one bucket: each takes several volumes
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port", "s3.port.grpc",
)  # fmt: skip


class S3Server:
    """A server on fixed ports over one data folder: it can be killed and started again, and still has what it had."""

    def __init__(self, folder: Path) -> None:
        access, secret = secrets.token_hex(8), secrets.token_hex(16)
        identity = {"name": "tests", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.data = folder / "data"  # what lies on its disk
        self.data.mkdir()
        self.ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        #: What a client needs, as the environment variables that boto, s3fs and pyarrow read.
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.uri = f"s3://{BUCKET}"
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, or start it again, and wait until it takes an object."""
        folder = self._folder
        command = [
            Path(sys.executable).with_name("weed"), "server", f"-dir={self.data}", "-s3",
            f"-s3.config={folder / 's3.json'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=50",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=1", "-s3.port.iceberg=0",
            "-s3.port.lance=0", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms",
            *(f"-{name}={port}" for name, port in self.ports.items()),
        ]  # fmt: skip
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=os.environ | {"HOME": str(folder)}
            )
        _make_bucket(self._process, self.environment, folder / "log")

    def kill(self) -> None:
        """As `kill -9` does, with what it has in hand. A clean stop would take 20 seconds, too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for port in self.ports.values():
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """Run a server with one empty bucket until the block ends; its data lies under `folder`."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _make_bucket(process: subprocess.Popen, environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            client = fsspec.filesystem(
                "s3", key=environment["AWS_ACCESS_KEY_ID"], secret=environment["AWS_SECRET_ACCESS_KEY"],
                endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True,
            )  # fmt: skip
            if not client.exists(BUCKET):
                client.mkdir(BUCKET)
            client.pipe_file(f"{BUCKET}/.ready", b"")  # a volume is up, too
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start ({error!r}):\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)
