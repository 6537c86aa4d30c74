"""What Ray's autoscaler is doing, which no public function of Ray says to a program: `ray status` reads the same."""

import json
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get


def nodes_are_coming() -> bool:
    """Whether nodes are being launched or set up now. False on a cluster without an autoscaler, and on one that is full
    or gets no machine."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)  # of the newer autoscaler
    if status.pending_launches or status.pending_nodes:
        return True
    said = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)  # of the older one
    report: dict[str, Any] = json.loads(said or b"{}").get("autoscaler_report") or {}
    return bool(report.get("pending_nodes")) or any((report.get("pending_launches") or {}).values())
