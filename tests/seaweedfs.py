"""A real S3 store for tests: SeaweedFS on this machine, with an identity of its own."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

BUCKET = "pcm-tests"  # one bucket: each takes several volumes
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port", "s3.port.grpc",
)  # fmt: skip


@dataclass(frozen=True)
class S3Server:
    """What a client needs, as the environment variables that boto, s3fs and pyarrow read."""

    environment: dict[str, str]
    uri: str  # of the bucket


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """Run a server with one empty bucket until the block ends; its data lies under `folder`."""
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    identity = {"name": "tests", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [
        Path(sys.executable).with_name("weed"), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", "-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=50", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=1", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=os.environ | {"HOME": str(folder)})
    try:
        _make_bucket(process, environment, folder / "log")
        yield S3Server(environment, f"s3://{BUCKET}")
    finally:
        process.kill()  # its data is thrown away, and a clean stop takes 20 seconds
        process.wait()
        for port in ports.values():
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)


def _make_bucket(process: subprocess.Popen, environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            client = fsspec.filesystem(
                "s3", key=environment["AWS_ACCESS_KEY_ID"], secret=environment["AWS_SECRET_ACCESS_KEY"],
                endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True,
            )  # fmt: skip
            client.mkdir(BUCKET)
            client.pipe_file(f"{BUCKET}/.ready", b"")  # a volume is up, too
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start ({error!r}):\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
