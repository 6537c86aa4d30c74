"""What each process of a run imports: torch and its kin take seconds and hundreds of megabytes, in every process."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from cluster.dataset.keys import shard_key
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from tests.helpers.paths import ROOT
from tests.helpers.tiny_generation import plan_dataset, tiny_spec, write_corpus

SAY_LOADED = """
import json, sys
print(json.dumps(sorted({"torch", "diffusers", "transformers", "open_clip", "pandas", "ray.data"} & set(sys.modules))))
"""


def loaded_by(program: str, *arguments: object) -> list[str]:
    """Which of the slow packages a program has loaded at its end, in a process of its own."""
    command = [sys.executable, "-c", program + SAY_LOADED, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_driver_checks_its_request_before_it_loads_what_only_a_run_needs() -> None:
    """The rest is loaded after the start of Ray, while Ray's first workers start."""
    assert loaded_by("import cluster.generation.make") == []


def test_a_writer_loads_no_model_library(tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> None:
    spec = tiny_spec(tiny_t2i, tiny_clip, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, ["A cat.", "A dog."]), spec, shard_size=2)
    block = FeaturiseShard(plan.spec.clip)(
        DrawShard(store, plan.spec)(pa.table({"shard": [0], "part": [plan.part_key(0)]}))
    )
    with pa.OSFile(str(tmp_path / "block"), "wb") as file, pa.ipc.new_stream(file, block.schema) as writer:
        writer.write_table(block)
    program = """
import sys
import pyarrow as pa
from cluster.generation.stages.write import WriteShard
from cluster.store.store import open_store
with pa.OSFile(sys.argv[1]) as file:
    block = pa.ipc.open_stream(file).read_all()
WriteShard(open_store(sys.argv[2]), int(sys.argv[3]))(block)
"""
    loaded = loaded_by(program, tmp_path / "block", tmp_path / "data", plan.schema_version)
    assert store.exists(shard_key(0)), "the shard was written"
    assert set(loaded) <= {"pandas"}, "Arrow loads pandas for lists"
