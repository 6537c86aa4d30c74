"""All that PCM-Net is measured for on a GPU, in one command that keeps to a time budget and needs torch alone.

    python -m benchmarks.gpu [--budget 480]
    python -m benchmarks.gpu --device cpu --size tiny     # only that it runs

At the published size, bfloat16 autocast: the training step (forward, loss, backward, clipping, Adam) at batch 32 and
1,024, eager and compiled, its share of the GPU's own matmul rate and the hours of a whole MSCOCO run; beam search in
captions a second, at the least (random weights hardly ever end one); what host-to-device copies of float16 and int8
features cost; whether a step waits for the GPU; and that the GPU computes what the CPU does. Each part is printed to
stderr as it is done, what is over budget is left out by name, and the last line of stdout is JSON. Text-to-image:
benchmarks.diffusion.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.matmul_rate import machine, matmul_rate
from benchmarks.published_size import published_model, random_batch
from benchmarks.training_step import Step
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.decoding import beam_search
from pcm.kernels.quantised import quantised

#: Pairs and epochs of the published MSCOCO run.
PAIRS, EPOCHS = 542_401, 12

TINY = PCMNetConfig(
    vocab_size=200, patch_dim=32, embed_dim=16, num_patches=9, num_concepts=10, max_length=6, hidden_size=32,
    num_heads=2, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, hidden_dropout=0.0,
    attention_dropout=0.0, visual_dropout=0.0, word_dropout=0.0, output_dropout=0.0, noise_variance=0.0,
)  # fmt: skip


@dataclass
class Report:
    """What was measured, part by part, while there was time."""

    device: str
    config: PCMNetConfig
    batches: tuple[int, int]
    budget: float
    started: float = field(default_factory=time.perf_counter)
    parts: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, measure: Callable[[], Any]) -> None:
        if time.perf_counter() - self.started > self.budget:
            self.left_out.append(name)
            return
        try:
            self.parts[name] = measure()
        except Exception as error:  # said in the result; the other parts are worth as much without this one
            self.parts[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        spent = time.perf_counter() - self.started
        print(f"{spent:.0f} s  {name}: {json.dumps(self.parts[name])}", file=sys.stderr, flush=True)

    def seconds_each(self, work: Callable[[], Any], *, count: int, repeats: int = 5, warm_up: int = 3) -> float:
        """Median of `repeats` rounds of `count` calls queued one behind another, as in training."""
        for _ in range(warm_up):
            work()
        rounds = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(count):
                work()
            self.wait()
            rounds.append((time.perf_counter() - start) / count)
        return median(rounds)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    # The parts.

    def same_numbers(self) -> dict[str, float]:
        """Largest differences of logits in float32, without TensorFloat32, and of captions: this device and the CPU."""
        model = published_model(self.config, device="cpu").eval()
        batch = random_batch(self.config, device="cpu", batch=16)
        features = (batch["global_feature"], batch["patch_features"])
        with torch.no_grad():
            expected, words = model(*features, batch["token_ids"]), beam_search(model, *features).token_ids
            model.to(self.device)
            there = [tensor.to(self.device) for tensor in features]
            found = model(*there, batch["token_ids"].to(self.device)).cpu()
            found_words = beam_search(model, *there).token_ids.cpu()
        return {
            "largest_logit": float(expected.abs().max()),
            "largest_difference": float((found - expected).abs().max()),
            "captions_equal": float((words == found_words).all(dim=1).float().mean()),
        }

    def training_step(self, batch_size: int, compile_mode: str, rate: float) -> dict[str, Any]:
        settings = {"device": self.device, "batch_size": batch_size, "bfloat16": self.device == "cuda"}
        gflop = Step(self.config, **settings).gflop()
        begun = time.perf_counter()
        step = Step(self.config, compile_mode=compile_mode, **settings)
        step()
        self.wait()
        ready = time.perf_counter() - begun
        each = self.seconds_each(step, count=max(5, 640 // batch_size) if self.device == "cuda" else 1)
        return {
            "milliseconds": round(1e3 * each, 3),
            "samples_per_second": round(batch_size / each, 1),
            "share_of_matmul_rate": round(gflop / each / rate, 3),
            "hours_of_the_coco_run": round(each * PAIRS * EPOCHS / batch_size / 3600, 3),
            "seconds_to_first_step": round(ready, 1),
            "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.device == "cuda" else None,
        }

    def host_waits(self) -> dict[str, int]:
        """How often the host waited for the GPU in one step, and in one beam search."""
        step = Step(self.config, device=self.device, batch_size=self.batches[0], bfloat16=True)
        model = published_model(self.config, device=self.device).eval()
        features = (step.batch["global_feature"], step.batch["patch_features"])
        counts = {}
        for name, work in (("training_step", step), ("beam_search", lambda: beam_search(model, *features))):
            work()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts[name] = sum("synchroniz" in str(warning.message) for warning in caught)
        return counts

    def decoding(self, batch_size: int, *, bfloat16: bool) -> dict[str, float]:
        """Of random weights, which hardly ever end a caption: trained ones do not take as long."""
        model = published_model(self.config, device=self.device).eval()
        batch = random_batch(self.config, device=self.device, batch=batch_size)

        def search() -> None:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=bfloat16):
                beam_search(model, batch["global_feature"], batch["patch_features"])

        each = self.seconds_each(search, count=1)
        return {"captions_per_second": round(batch_size / each, 1), "milliseconds": round(1e3 * each, 2)}

    def feeding(self, kind: str) -> dict[str, float]:
        """A step whose batch is copied from pinned memory and cast on the device, as training does."""
        batch_size = self.batches[1]
        step = Step(self.config, device=self.device, batch_size=batch_size, bfloat16=self.device == "cuda")
        host = {name: tensor.cpu() for name, tensor in step.batch.items()}
        patches, scale = host["patch_features"].half(), torch.zeros(batch_size, 0).half()
        host["global_feature"] = host["global_feature"].half()
        if kind == "int8":
            patches, scale = quantised(patches)
        host |= {"patch_features": patches, "patch_scale": scale}
        size = sum(tensor.nbytes for tensor in host.values())

        def copied() -> dict[str, Tensor]:
            if self.device != "cuda":
                return host
            return {name: tensor.pin_memory().to("cuda", non_blocking=True) for name, tensor in host.items()}

        each = self.seconds_each(lambda: step(copied()), count=3)
        return {
            "samples_per_second": round(batch_size / each, 1),
            "milliseconds": round(1e3 * each, 2),
            "megabytes_a_batch": round(size / 1e6, 1),
        }


def measure(report: Report) -> None:
    """All parts, those that matter most first."""
    small, large = report.batches
    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    report.add("matmul_gflops", lambda: round(matmul_rate(dtype, device=report.device, repeats=7), 1))
    rate = report.parts.get("matmul_gflops", float("nan"))
    report.add("same_numbers", report.same_numbers)

    def training_step(batch_size: int, mode: str) -> None:
        name = f"training_step batch {batch_size} compile {mode}"
        report.add(name, lambda: report.training_step(batch_size, mode, rate))

    def decoding(batch_size: int, *, bfloat16: bool) -> None:
        name = f"beam_search batch {batch_size} {'bfloat16' if bfloat16 else 'float32'}"
        report.add(name, lambda: report.decoding(batch_size, bfloat16=bfloat16))

    training_step(small, "none")
    training_step(large, "none")
    decoding(64, bfloat16=False)
    decoding(large, bfloat16=False)
    if report.device == "cuda":
        report.add("host_waits", report.host_waits)
    training_step(small, "reduce-overhead")
    training_step(small, "default")
    training_step(large, "default")
    report.add(f"fed batch {large} float16", lambda: report.feeding("float16"))
    report.add(f"fed batch {large} int8", lambda: report.feeding("int8"))
    decoding(large, bfloat16=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="published", choices=("published", "tiny"))
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further part is begun")
    arguments = parser.parse_args()
    tiny = arguments.size == "tiny"
    report = Report(
        device=arguments.device,
        config=TINY if tiny else PCMNetConfig(),
        batches=(4, 8) if tiny else (32, 1024),
        budget=arguments.budget,
    )
    measure(report)
    print(json.dumps({**report.parts, "left_out": report.left_out, **machine(arguments.device)}))


if __name__ == "__main__":
    main()
