"""KubeRay's files keep to its schema: pods to that of Kubernetes, the rest to the fields that KubeRay 1.6 and 1.7 take.

A server drops a field that it does not know, or refuses the file. So no unknown field is allowed at any depth.
"""

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helpers.paths import ROOT

#: The newest that the package knows.
KUBERNETES = "1.37"
STRING, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
POD_TEMPLATE = {"type": "object"}  # validated as a pod


def fields(required: str = "", **properties: dict) -> dict:
    """The schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


HEAD = fields(
    "template",
    template=POD_TEMPLATE,
    rayStartParams=STRINGS,
    labels=STRINGS,
    resources=STRINGS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=FLAG,
)
WORKERS = fields(
    "groupName minReplicas maxReplicas template",
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    template=POD_TEMPLATE,
    rayStartParams=STRINGS,
    labels=STRINGS,
    resources=STRINGS,
    suspend=FLAG,
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=fields(mode={"enum": ["token", "disabled"]}, secretName=STRING, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    suspend=FLAG,
)
JOB = fields(
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    runtimeEnvYAML=STRING,
    metadata=STRINGS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    rayClusterSpec=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError. Pods' own errors are of a class that derives from it."""
    whole = fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": document["kind"]},
        metadata=fields("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
        spec=SPECS[document["kind"]],
    )
    jsonschema.validate(document, whole)
    for pod in pods(document):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A pod of each group, as the operator makes it of the group's template."""
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}


@pytest.fixture(params=["raycluster.yaml", "rayjob-generate.yaml"])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / request.param).read_text())


def test_a_kuberay_file_keeps_to_the_schema(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("gpus",), 1),
        (("workerGroupSpecs", 0, "minReplica"), 0),
        (("workerGroupSpecs", 0, "maxReplicas"), "16"),
        (("workerGroupSpecs", 0, "rayStartParams"), {"num-cpus": 4}),
        (("headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "6379"),
        (("headGroupSpec", "template", "spec", "tolerations"), [{"keys": "nvidia.com/gpu"}]),
        (("authOptions", "mode"), "password"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_found_at_any_depth(document: dict[str, Any], place: tuple, value: Any) -> None:
    changed = copy.deepcopy(document)
    *way, last = place
    inner = changed["spec"].get("rayClusterSpec", changed["spec"])
    for step in way:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(changed)


def test_the_network_policy_keeps_to_the_schema_of_kubernetes() -> None:
    policy = yaml.safe_load((ROOT / "deploy/networkpolicy.yaml").read_text())
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    with pytest.raises(jsonschema.ValidationError):
        kubernetes_validate.validate({**policy, "spec": {**policy["spec"], "ingres": []}}, KUBERNETES, strict=True)
