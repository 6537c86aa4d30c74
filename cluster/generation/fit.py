"""Whether a model fits into a GPU of the cluster, as far as that can be told before a process is started on one."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from cluster.session import is_joined, labels_text
from pcm.errors import InputError
from pcm.generation.model_memory import ModelMemory, gigabytes
from pcm.spec import GeneratorSpec

log = logging.getLogger(__name__)

#: GB of the GPUs that Ray knows by name; of those with two sizes the larger. Of another one, the generator's process
#: asks the GPU itself before it loads anything.
GPU_GIGABYTES = {
    "K80": 12, "P4": 8, "P100": 16, "V100": 32, "T4": 16, "A10G": 24, "A10": 24, "L4": 24, "L40": 48, "L40S": 48,
    "RTX-A6000": 48, "A100": 80, "A100-40G": 40, "A100-80G": 80, "H100": 94, "H200": 141, "H20": 96, "GH200": 144,
    "B200": 192, "B300": 288,
}  # fmt: skip
#: GPUs before compute capability 8: their bfloat16 is emulated.
WITHOUT_BFLOAT16 = ("P4", "P100", "V100", "T4")
_TYPE = "accelerator_type:"


def check_memory(
    spec: GeneratorSpec, memory: ModelMemory, *, labels: Mapping[str, str] | None = None, measures: bool = False
) -> None:
    """Say what the model takes, and whether every GPU on nodes with these labels is known, and too small.

    That raises InputError on a machine of its own. To a cluster others may come: there it is a warning, and generators
    that find their GPU too small leave their shards to others. But with `measures`, where the first GPU that is free
    tells the speed, it raises InputError there too.
    """
    log.info(
        "%s: %s, on %s", spec.model,
        memory.describe(spec.dtype, pictures=spec.batch_size, offload=spec.offload), spec.device,
    )  # fmt: skip
    if spec.device != "cuda":
        return
    largest = largest_gpu(ray.nodes(), labels or {})
    needed = memory.bytes(spec.dtype, offload=spec.offload)
    if largest is None or needed <= largest * 1e9:
        return
    offload = {"none": "--offload model, or ", "model": "--offload sequential, or "}.get(spec.offload, "")
    where = f"nodes with {labels_text(labels)}" if labels else "the cluster"
    said = (
        f"text-to-image model {spec.model!r}: takes about {gigabytes(needed)} as {spec.dtype} with one picture, and "
        f"the largest GPU of {where} has {largest} GB"
    )
    if is_joined() and measures:
        raise InputError(
            f"{said} now, on which batch size and shard size would be measured; give --batch-size and --shard-size "
            f"numbers, {offload}--node-label of nodes with larger GPUs"
        )
    if not is_joined():
        raise InputError(f"{said}; give {offload}a GPU with more memory: one model over several GPUs is not supported")
    log.warning(
        "%s now: it draws nothing there, only on larger ones that come; give %s--node-label of nodes with such GPUs",
        said, offload,
    )  # fmt: skip


def warn_of_slow_bfloat16_on_cluster(device: str, dtype: str, *, labels: Mapping[str, str] | None = None) -> None:
    """Warn where a new dataset is to be made in bfloat16 on GPUs, of nodes with these labels, that have none."""
    if device != "cuda" or dtype != "bfloat16":
        return
    if slow := [kind for kind in WITHOUT_BFLOAT16 if kind in _kinds(ray.nodes(), labels or {})]:
        log.warning(
            "GPUs of the cluster (%s) have no bfloat16 of their own, and are slow in it; end this and give "
            "--dtype float16, for a dataset keeps what it was begun with",
            ", ".join(slow),
        )


def largest_gpu(nodes: Iterable[Mapping[str, Any]], labels: Mapping[str, str]) -> int | None:
    """GB of the largest GPU of the Ray nodes with these labels; None where they have none, or one that is not known by
    name."""
    kinds = _kinds(nodes, labels)
    if not kinds <= GPU_GIGABYTES.keys():
        return None
    return max((GPU_GIGABYTES[kind] for kind in kinds), default=None)


def _kinds(nodes: Iterable[Mapping[str, Any]], labels: Mapping[str, str]) -> set[str]:
    """The GPUs of the Ray nodes with these labels, as Ray names them; "" for one that it does not know."""
    found = set()
    for node in nodes:
        if node["Alive"] and node["Resources"].get("GPU") and labels.items() <= (node.get("Labels") or {}).items():
            kinds = [name.removeprefix(_TYPE) for name in node["Resources"] if name.startswith(_TYPE)]
            found.add(kinds[0] if kinds else "")
    return found
