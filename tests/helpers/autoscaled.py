"""A Ray cluster that grows and shrinks by Ray's own autoscaler, the second one, as `ray up` and KubeRay start it.

Its configuration is ray_cluster.yaml, but for the machines: those are raylets on this one, and come by the node
provider with which Ray tests its autoscaler.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.util import prepare_config
from ray.util import get_node_ip_address

from tests.helpers.hosts import OF_ONE_MACHINE
from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_RAY = Path(sys.executable).parent / "ray"
_MEMORY = {"object_store_memory": 100_000_000}


@dataclass
class AutoscaledCluster:
    """`folder` has a short path: a socket's has at most 107 bytes. `node_types`: as in `available_node_types`, without
    node_config."""

    folder: Path
    node_types: Mapping[str, Mapping[str, Any]]
    idle_seconds: float = 10.0
    port: int = field(default_factory=lambda: _free_port())
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def environment(self) -> dict[str, str]:
        """Of a job on it."""
        address = f"{get_node_ip_address()}:{self.port}"
        own = {name: value for name, value in os.environ.items() if name != OF_ONE_MACHINE}
        return own | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        """A head that draws and trains nothing, and nothing else."""
        config = self.folder / "autoscaler.json"
        config.write_text(json.dumps(self._config()))
        identity = {
            "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }  # fmt: skip
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"} | identity
        options = [
            "--head", f"--port={self.port}", "--num-cpus=0", "--object-store-memory=100000000",
            f"--temp-dir={self.folder}/ray", f"--autoscaling-config={config}", "--include-dashboard=false",
            "--disable-usage-stats",
        ]  # fmt: skip
        started = subprocess.run([_RAY, "start", *options], env=environment, capture_output=True, text=True)
        assert started.returncode == 0, started.stdout + started.stderr

    def node_types_started(self) -> list[str]:
        """The type of each machine that the autoscaler has started so far, in order."""
        log = next((self.folder / "ray").glob("session_2*/logs/monitor.log")).read_text()
        launched = re.findall(r"Launched (\d+) nodes of type (\w+)", log)
        return [kind for count, kind in launched for _ in range(int(count))]

    def wait_until_idle_machines_are_gone(self) -> None:
        wait_until(lambda: not self._workers(), seconds=120, said="an idle machine stays")

    def stop(self) -> None:
        subprocess.run(["pkill", "--signal", "KILL", "--full", f"{self.folder}/ray"], check=False)

    def _workers(self) -> list[str]:
        raylets = subprocess.run(
            ["pgrep", "--full", "--list-full", f"raylet/raylet.*{self.folder}/ray"], capture_output=True, text=True
        )
        return raylets.stdout.splitlines()[1:]  # one is the head's

    def _config(self) -> dict[str, Any]:
        given = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))  # as `ray up` does
        types = {
            name: {**kind, "node_config": {}, "resources": {**kind["resources"], **_MEMORY}}
            for name, kind in self.node_types.items()
        }
        types[FAKE_HEAD_NODE_TYPE] = {"resources": {"CPU": 0, **_MEMORY}, "node_config": {}, "max_workers": 0}
        provider = {
            "type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"{get_node_ip_address()}:{self.port}",
        }  # fmt: skip
        return given | {
            "provider": provider, "docker": {}, "file_mounts": {}, "idle_timeout_minutes": self.idle_seconds / 60,
            "available_node_types": types, "head_node_type": FAKE_HEAD_NODE_TYPE,
        }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
