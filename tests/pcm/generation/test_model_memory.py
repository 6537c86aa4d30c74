"""What a model takes is told from the headers of its files, and a model that does not fit is refused unread."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.generation.fit import check_memory, largest_gpu, warn_of_slow_bfloat16_on_cluster
from pcm.errors import InputError
from pcm.generation.model_memory import CONTEXT, LIVE_MAPS, ModelMemory, available_here, model_memory, refuse_too_large
from pcm.generation.pipeline_loading import load_pipeline
from tests.helpers.original_checkpoint import save_original
from tests.pcm.generation.test_diffusers_pipeline import spec_of

PARTS = ("text_encoder", "unet", "vae")


def numbers_in(folder: Path) -> int:
    return sum(weight.numel() for file in folder.rglob("*.safetensors") for weight in load_file(file).values())


def test_the_weights_of_each_part_are_counted(tiny_t2i: Path) -> None:
    memory = model_memory(spec_of(tiny_t2i))
    assert memory is not None
    assert memory.weights == {part: numbers_in(tiny_t2i / part) for part in PARTS}
    assert memory.decoder_map == 16 * 32 * 32, "channels and pixels"
    total = sum(memory.weights.values())
    assert memory.bytes("bfloat16", pictures=4) == 2 * (total + LIVE_MAPS * 4 * 16 * 32 * 32) + CONTEXT
    largest = max(memory.weights.values())
    assert memory.bytes("float32", offload="model") == 4 * (largest + LIVE_MAPS * 16 * 32 * 32) + CONTEXT
    without = model_memory(spec_of(tiny_t2i, without=("text_encoder",)))
    assert without is not None and set(without.weights) == {"unet", "vae"}


def test_only_the_files_that_are_loaded_count(tiny_t2i: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(tiny_t2i, tmp_path / "both"))
    for file in both.rglob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(weights, file.with_name(f"{file.stem}.fp16.safetensors"))
        save_file({"x": torch.zeros(1000)}, file.with_name(f"{file.stem}.non_ema.safetensors"))
    plain = model_memory(spec_of(tiny_t2i))
    assert model_memory(spec_of(both)) == plain == model_memory(spec_of(both, variant="fp16"))


def test_a_single_file_takes_what_its_folder_does(tiny_t2i: Path, tmp_path: Path) -> None:
    file = save_original(tiny_t2i, tmp_path / "one.safetensors")
    one = model_memory(spec_of(file, config=str(tiny_t2i), config_revision="x"))
    folder = model_memory(spec_of(tiny_t2i))
    assert one is not None and folder is not None
    assert sum(one.weights.values()) == sum(folder.weights.values()) and one.decoder_map == folder.decoder_map


def test_a_model_that_is_larger_than_the_machine_is_refused_before_it_is_read(tiny_t2i: Path, tmp_path: Path) -> None:
    """A file of 4 TB that is nearly all hole: reading it would end in no time that a test has."""
    large = Path(shutil.copytree(tiny_t2i, tmp_path / "large"))
    size = 4 * 10**12
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (large / "unet/diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(InputError, match=r"takes about 4000\.\d GB as float32 .* give --dtype bfloat16, or a machine"):
        load_pipeline(spec_of(large))


def test_what_fits_is_not_refused_and_what_does_not_says_what_to_do(tiny_t2i: Path) -> None:
    spec = spec_of(tiny_t2i, device="cuda", dtype="bfloat16")
    refuse_too_large(spec, 10**9, "the GPU")
    with pytest.raises(InputError, match=r"the GPU has 0\.4 GB; give --offload model, or a GPU with more memory"):
        refuse_too_large(spec, 4 * 10**8, "the GPU")
    assert available_here("cpu")[0] > 10**9


def node(gpus: int = 1, kind: str | None = None, *, alive: bool = True, role: str = "training") -> dict:
    resources = (
        {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}) | ({f"accelerator_type:{kind}": 1.0} if kind else {})
    )
    return {"Alive": alive, "Resources": resources, "Labels": {"role": role}}


def test_the_largest_gpu_is_known_by_its_name_or_not_at_all() -> None:
    assert largest_gpu([node(0), node(1, "T4"), node(4, "L4"), node(1, "H100", alive=False)], {}) == 24
    assert largest_gpu([node(1, "T4"), node(1, "Something")], {}) is None
    assert largest_gpu([node(1, "T4"), node(1)], {}) is None
    assert largest_gpu([node(0)], {}) is None
    assert largest_gpu([node(1, "T4"), node(1, "H100", role="generation")], {"role": "training"}) == 16
    assert largest_gpu([node(1, "T4")], {"role": "generation"}) is None


def test_gpus_without_bfloat16_are_named_before_a_dataset_is_begun(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node(1, "T4", role="generation"), node(1, "L4")])
    warn_of_slow_bfloat16_on_cluster("cuda", "float16")
    warn_of_slow_bfloat16_on_cluster("cpu", "bfloat16")
    warn_of_slow_bfloat16_on_cluster("cuda", "bfloat16", labels={"role": "training"})
    assert caplog.messages == []
    warn_of_slow_bfloat16_on_cluster("cuda", "bfloat16")
    (said,) = caplog.messages
    assert said.startswith("GPUs of the cluster (T4) have no bfloat16 of their own") and "float16" in said


def test_a_cluster_to_which_larger_gpus_may_come_is_not_refused(
    tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node(1, "T4")])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    large = ModelMemory({"transformer": 17 * 10**9}, 10**6)
    spec = spec_of(tiny_t2i, device="cuda", dtype="bfloat16")
    check_memory(spec, large)
    assert "has 16 GB now" in caplog.text and "--node-label" in caplog.text
    with pytest.raises(InputError, match="on which batch size and shard size would be measured; give --batch-size and"):
        check_memory(spec, large, measures=True)
    caplog.clear()
    check_memory(spec, large, labels={"role": "generation"}, measures=True)
    assert not [line for line in caplog.records if line.levelname == "WARNING"]
    monkeypatch.setattr("ray.nodes", lambda: [node(1, "T4") | {"Labels": {"role": "generation"}}, node(1, "H100")])
    check_memory(spec, large, labels={"role": "generation"})
    assert "the largest GPU of nodes with role=generation has 16 GB now" in caplog.text


def test_a_cluster_whose_gpus_are_too_small_is_refused_before_a_process_starts(
    tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node(1, "T4")])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    large = ModelMemory({"transformer": 12 * 10**9, "text_encoder": 5 * 10**9}, 10**6)
    spec = spec_of(tiny_t2i, device="cuda", dtype="bfloat16")
    with pytest.raises(InputError, match=r"takes about 34\.\d GB as bfloat16 .* has 16 GB; give --offload model"):
        check_memory(spec, large)
    with pytest.raises(InputError, match="give --offload sequential"):
        check_memory(spec_of(tiny_t2i, device="cuda", dtype="bfloat16", offload="model"), large)
    check_memory(spec_of(tiny_t2i, device="cuda", dtype="bfloat16", offload="sequential"), large)
    check_memory(spec_of(tiny_t2i), large)
