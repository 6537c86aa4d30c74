"""The cluster files are data that a cloud will execute: valid by Ray's schema, and keeping the rules we promise."""

import copy
import re

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import pcm
from tests.helpers.paths import ROOT

#: With the metrics: training and evaluation run in the image too.
INSTALL = r'pip install --no-cache-dir -c constraints\.txt -e "\.\[\$EXTRAS\]"'
#: The files that a cloud executes, or that lay out what one does.
CLUSTER_FILES = ["ray_cluster.yaml", *sorted(f"deploy/{path.name}" for path in (ROOT / "deploy").iterdir())]
#: Shapes of secrets: AWS key ids, private keys, anything named like a secret with a literal value.
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret_access_key|aws_access_key_id|password|auth_token)\s*[:=]\s*['\"]?[\w/+]{8,}"
)


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module")
def ray_clusters() -> dict[str, dict]:
    """The cluster of each KubeRay file: the job's own, and the one that stays."""
    job = yaml.safe_load((ROOT / "deploy/rayjob-generate.yaml").read_text())
    stays = yaml.safe_load((ROOT / "deploy/raycluster.yaml").read_text())
    return {"RayJob": job["spec"]["rayClusterSpec"], "RayCluster": stays["spec"]}


@pytest.fixture(scope="module")
def ray_job() -> dict:
    return yaml.safe_load((ROOT / "deploy/rayjob-generate.yaml").read_text())


KINDS = ("RayJob", "RayCluster")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_cluster_is_valid_by_rays_own_schema(cluster: dict) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_schema_check_refuses_an_unknown_field(cluster: dict) -> None:
    with pytest.raises(Exception, match="worker_count"):
        validate_config(prepare_config(copy.deepcopy(cluster) | {"worker_count": 3}))


def test_head_has_no_gpu_and_takes_no_pipeline_stage(cluster: dict) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert not re.match(r"[gp]\d", head["node_config"]["InstanceType"]), "a GPU instance as head"
    assert "InstanceMarketOptions" not in head["node_config"], "a head on spot takes the whole cluster with it"


def test_generation_is_on_spot_and_training_on_demand_and_both_scale_to_zero(cluster: dict) -> None:
    types = cluster["available_node_types"]
    workers = {name: spec for name, spec in types.items() if name != cluster["head_node_type"]}
    spot = {name for name, spec in workers.items() if "InstanceMarketOptions" in spec["node_config"]}
    assert spot == {"generation_spot"} and set(workers) - spot == {"training_on_demand"}
    for spec in workers.values():
        assert spec["min_workers"] == 0 < spec["max_workers"]
        assert spec["resources"]["GPU"] >= 1


def test_every_node_reaches_the_object_store_by_its_role(cluster: dict) -> None:
    for name, spec in cluster["available_node_types"].items():
        assert spec["node_config"]["IamInstanceProfile"]["Name"], name


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_no_credential_stands_in_a_cluster_file(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not SECRET.search(text), SECRET.search(text)


def test_secret_pattern_finds_a_secret() -> None:
    assert SECRET.search("aws_access_key_id: AKIAIOSFODNN7EXAMPLE")
    assert SECRET.search("RAY_AUTH_TOKEN=0123456789abcdef")


def test_every_start_command_has_token_authentication_and_no_usage_statistics(cluster: dict) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        start = next(command for command in commands if "ray start" in command)
        assert "RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_mounted_files_exist(cluster: dict) -> None:
    for remote, local in cluster["file_mounts"].items():
        assert local.startswith("~") or (ROOT / local).exists(), f"{remote}: {local}"


def test_a_node_installs_nothing_as_it_starts(cluster: dict) -> None:
    kinds = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = [command for kind in kinds for command in cluster[kind]]
    commands += [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert not [command for command in commands if re.search(r"\b(pip|apt|apt-get|conda|curl|wget)\b", command)]


def test_every_launcher_runs_the_same_pinned_image(cluster: dict, ray_clusters: dict[str, dict]) -> None:
    images = {cluster["docker"]["image"]}
    for each in ray_clusters.values():
        groups = [each["headGroupSpec"], *each["workerGroupSpecs"]]
        images |= {box["image"] for group in groups for box in group["template"]["spec"]["containers"]}
    images.add(
        yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())["resources"]["image_id"].removeprefix("docker:")
    )
    assert images == {f"REGISTRY/pcmnet-ray:{pcm.__version__}"}


def test_the_image_has_what_ray_up_needs_of_it(cluster: dict) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    packages = re.search(r"apt-get install --yes --no-install-recommends ([^\\]+)", dockerfile)
    assert packages and {"openssh-client", "rsync", "wget"} <= set(packages[1].split())
    assert "-c constraints.txt boto3\n" in dockerfile
    # A login shell sets the PATH anew; Ray's updater and KubeRay both start one.
    assert "~/.profile" in dockerfile and "~/.bashrc" in dockerfile
    assert cluster["docker"]["worker_run_options"] == ["--gpus all"]


def test_the_image_installs_what_laptop_and_ci_install() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert re.search(INSTALL, dockerfile) and "\nARG EXTRAS=evaluation\n" in dockerfile
    for command in re.findall(r"pip install[^\n&]*", dockerfile):
        assert "-c constraints.txt" in command, f"unpinned: {command}"


def test_image_has_the_python_that_the_project_is_tested_with() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    base = re.search(r"^ARG BASE_IMAGE=python:(\d+\.\d+)\.\d+-\S+\nFROM \$\{BASE_IMAGE\}$", dockerfile, re.MULTILINE)
    assert base and base[1] == "3.11"


def test_image_copies_everything_the_install_needs() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    copied = {
        name for line in re.findall(r"^COPY --chown=ray (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "pcm", "cluster", "jobs"}


def test_nodes_of_aws_are_closed(cluster: dict) -> None:
    for name, spec in cluster["available_node_types"].items():
        config = spec["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}, name
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"]), name
        # In a group that Ray makes, everybody may try SSH.
        assert len(config["SecurityGroupIds"]) == 1, name


@pytest.mark.parametrize("kind", KINDS)
def test_pods_run_as_a_user_without_privileges(ray_clusters: dict[str, dict], kind: str) -> None:
    cluster = ray_clusters[kind]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for box in pod["containers"]:
            assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    assert all(pod["automountServiceAccountToken"] is False for pod in workers)


def test_only_pods_of_the_namespace_and_the_operator_reach_the_cluster(ray_job: dict) -> None:
    policy = yaml.safe_load((ROOT / "deploy/networkpolicy.yaml").read_text())
    assert (policy["kind"], policy["spec"]["policyTypes"]) == ("NetworkPolicy", ["Ingress", "Egress"])
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    assert sources and all(source and "ipBlock" not in source for source in sources)
    outside = [rule for rule in policy["spec"]["egress"] if any("ipBlock" in to for to in rule.get("to", []))]
    assert [[port["port"] for port in rule["ports"]] for rule in outside] == [[443]]


def test_ray_job_ends_with_its_cluster_gone(ray_job: dict) -> None:
    spec = ray_job["spec"]
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["entrypoint"].startswith("python -m jobs.generate ")
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_USAGE_STATS_ENABLED"] == "0"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_ray_job_arguments_are_those_of_the_job(ray_job: dict) -> None:
    from jobs.generate import JOB

    args = JOB.read(ray_job["spec"]["entrypoint"].split()[3:])
    group = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (args.device, args.generators) == ("cuda", group["maxReplicas"])


@pytest.mark.parametrize("kind", KINDS)
def test_kuberay_runs_the_pinned_ray_in_a_pinned_image(ray_clusters: dict[str, dict], kind: str) -> None:
    cluster = ray_clusters[kind]
    assert cluster["rayVersion"] == pins()["ray"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {box["image"] for group in groups for box in group["template"]["spec"]["containers"]}
    assert len(images) == 1
    tag = images.pop().rpartition(":")[2]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tag), "an image tag must name one version"


@pytest.mark.parametrize("kind", KINDS)
def test_kuberay_keeps_gpus_off_the_head(ray_clusters: dict[str, dict], kind: str) -> None:
    cluster = ray_clusters[kind]
    head = cluster["headGroupSpec"]
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_hubs_token_reaches_every_pod_by_name(ray_clusters: dict[str, dict], kind: str) -> None:
    groups = [ray_clusters[kind]["headGroupSpec"], *ray_clusters[kind]["workerGroupSpecs"]]
    for box in (box for group in groups for box in group["template"]["spec"]["containers"]):
        token = next(each for each in box["env"] if each["name"] == "HF_TOKEN")
        assert "value" not in token and token["valueFrom"]["secretKeyRef"]["optional"] is True


def test_the_ray_cluster_stays_has_a_token_and_the_labels_of_aws(cluster: dict, ray_clusters: dict[str, dict]) -> None:
    document = yaml.safe_load((ROOT / "deploy/raycluster.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayCluster")
    spec = ray_clusters["RayCluster"]
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    aws = {tuple(each.get("labels", {}).items()) for each in cluster["available_node_types"].values()} - {()}
    assert {tuple(group["labels"].items()) for group in spec["workerGroupSpecs"]} == aws


def test_both_kuberay_files_describe_the_same_nodes_for_generation(ray_clusters: dict[str, dict]) -> None:
    job, stays = ray_clusters["RayJob"], ray_clusters["RayCluster"]
    assert job["headGroupSpec"] == stays["headGroupSpec"]
    mine, theirs = job["workerGroupSpecs"][0], stays["workerGroupSpecs"][0]
    assert mine == {name: value for name, value in theirs.items() if name != "labels"}


def test_the_lock_has_a_hash_of_every_package_in_the_version_of_the_constraints() -> None:
    lines = (ROOT / "deploy/requirements-linux-x86_64.lock").read_text().splitlines()
    entry = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}(  # \(\*\))?")
    found = [entry.fullmatch(line) for line in lines if not line.startswith("#")]
    assert len(found) > 100 and all(found)
    pinned = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pins().items()}
    for match in found:
        assert match is not None
        name, version, marked = match.groups()
        assert (pinned.get(name) is None) == bool(marked), name
        assert marked or version == pinned[name], name
    assert {"torch", "ray", "diffusers", "open-clip-torch"} <= {match[1] for match in found if match}
