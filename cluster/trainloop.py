"""The training loop that every Ray Train worker runs: PCM-Net under DDP, one checkpoint an epoch, exact resume.

Nothing random depends on what ran before: the row order is a function of (seed, epoch), dropout and noise of
(seed, rank, step). So a checkpoint needs no generator states, and a run that was killed goes on as if it had not been.
"""

import hashlib
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from torch import nn

from cluster.dataset import CLIP_HEAD_KEY, CONCEPTS_KEY, VOCABULARY_KEY, Manifest, load_manifest
from cluster.global_loss import GlobalBatchLoss
from cluster.loader import CACHE_BYTES, Batch, Selection, ShardLoader, split_holdout
from cluster.pictures import PictureSource
from cluster.storage import Store, open_store
from cluster.trainconfig import TrainConfig
from cluster.validation import ValidationShare, held_out_share, picture_share, validation_cider
from pcm.captioner import MODEL_FILE, captioner_files
from pcm.clip import ClipEncoder
from pcm.concepts import ConceptVocabulary
from pcm.model import PCMNet
from pcm.schedule import noam_lr
from pcm.vocabulary import Vocabulary

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
METRICS_KEY = "metrics.jsonl"
BEST = "best"

#: On a GPU the loss is read back, and checked, once in so many steps: reading it makes the GPU wait.
GPU_CHECK_STEPS = 50
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What crosses to the workers: where the data is, where the run goes, and its science."""

    data: str  # absolute path or URI
    out: str
    config: TrainConfig
    document: dict[str, Any]  # config.json of the run, also written into every checkpoint
    validation: PictureSource | None  # None: held-out synthetic pairs
    clip: str  # NAME of the CLIP for validation pictures
    cpu_threads: int
    cache_bytes: int = CACHE_BYTES


@dataclass
class Progress:
    """How far training is; the part of a checkpoint that is neither weights nor optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps made
    history: list[dict[str, Any]] = field(default_factory=list)  # one row of metrics.jsonl an epoch

    @property
    def best_cider(self) -> float:
        return max((row["CIDEr"] for row in self.history), default=float("-inf"))


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the step and the rows."""


def train_loop(loop_config: dict[str, Any]) -> str:
    """train_loop_per_worker of Ray Train. Returns "" or, the same on every worker, why training was stopped."""
    try:
        _Worker(loop_config["run"]).train()
    except NonFiniteLoss as error:
        return str(error)  # not raised: Ray would start the same arithmetic again
    return ""


class _Worker:
    """One rank of a run."""

    def __init__(self, run: Run) -> None:
        _log_to_stderr()
        context = ray.train.get_context()
        self.run, self.config = run, run.config
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(run.cpu_threads)
        self.bfloat16 = resolved_precision(self.config.precision, self.device.type) == "bfloat16"
        self.out = open_store(run.out)
        store = open_store(run.data)
        manifest = load_manifest(store)
        self._vocabulary_data, self._concepts_data = store.read_bytes(VOCABULARY_KEY), store.read_bytes(CONCEPTS_KEY)
        self.vocabulary = Vocabulary.from_text(self._vocabulary_data.decode())

        torch.manual_seed(self.config.seed)
        self.module = self._network(store).to(self.device)
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(
            parameters,
            lr=0.0,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
            fused=True,
        )
        self.criterion = GlobalBatchLoss(**self.config.loss_settings)
        self.progress = self._restored()
        self.model = ray.train.torch.prepare_model(
            self.module, parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True}
        )
        self.loader, self.validation = self._data(store, manifest)

    def _network(self, store: Store) -> PCMNet:
        concepts = ConceptVocabulary.from_bytes(self._concepts_data)
        model = PCMNet(self.config.model)
        model.set_concepts(torch.from_numpy(concepts.embeddings))
        model.set_clip_head(safetensors.torch.load(store.read_bytes(CLIP_HEAD_KEY)))
        return model

    def _data(self, store: Store, manifest: Manifest) -> tuple[ShardLoader, ValidationShare]:
        config, place = self.config, {"rank": self.rank, "num_workers": self.num_workers}
        keys = tuple(shard["key"] for shard in manifest.shards)
        if self.run.validation is None:
            training, held_out = split_holdout(
                store, keys, fraction=config.holdout_fraction, limit=config.holdout_limit, seed=config.seed
            )
            validation = held_out_share(store, held_out, manifest.features, **place)
            source = f"{len(held_out)} held-out synthetic pairs"
        else:
            training = Selection(keys, tuple(np.arange(shard["rows"]) for shard in manifest.shards))
            clip = manifest.spec.clip
            encoder = ClipEncoder(self.run.clip, device=str(self.device), dtype=clip.dtype, batch_size=clip.batch_size)
            validation = picture_share(self.run.validation, encoder, **place)
            source = self.run.validation.images
        loader = ShardLoader(
            store,
            training,
            features=manifest.features,
            vocabulary=self.vocabulary,
            batch_size=config.batch_size,
            max_length=config.model.max_length,
            window_shards=config.window_shards,
            seed=config.seed,
            trim=self.device.type == "cpu",
            cache_bytes=self.run.cache_bytes,
            **place,
        )
        self._say(
            f"training on {len(training)} pairs, {loader.steps_per_epoch} steps an epoch, {config.epochs} epochs; "
            f"validation on {source}; {sum(p.numel() for p in self.parameters):,} parameters; "
            f"{self.num_workers} worker(s) on {self.device.type}, {'bfloat16' if self.bfloat16 else 'float32'}"
        )
        return loader, validation

    def train(self) -> None:
        if self.rank == 0:
            self._write_metrics()
        while self.progress.epoch < self.config.epochs:
            started = time.monotonic()
            loss, lr, samples = self._train_epoch()
            trained = time.monotonic()
            cider = validation_cider(
                self.module, self.vocabulary, self.validation, beam_size=self.config.validation_beam_size
            )
            self.progress.epoch += 1
            is_best = cider > self.progress.best_cider
            metrics = {
                "epoch": self.progress.epoch,
                "step": self.progress.step,
                "loss": loss,
                "lr": lr,
                "CIDEr": cider,
                "seconds": round(trained - started, 3),
                "validation_seconds": round(time.monotonic() - trained, 3),
                "samples_per_second": round(samples / (trained - started), 2),
            }
            self.progress.history.append(metrics)
            self._say(
                f"epoch {self.progress.epoch}/{self.config.epochs}: loss {loss:.4f}, lr {lr:.2e}, CIDEr {cider:.4f}"
                f"{' (best)' if is_best else ''}, {metrics['samples_per_second']} samples/s, "
                f"{metrics['seconds']:.1f} s + {metrics['validation_seconds']:.1f} s validation"
            )
            self._report(metrics, is_best=is_best)

    def _train_epoch(self) -> tuple[float, float, int]:
        """(mean loss, last learning rate, samples) of the epoch after the last one finished."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        unchecked: list[tuple[Batch, torch.Tensor]] = []
        check_steps = GPU_CHECK_STEPS if self.device.type == "cuda" else 1
        started = last_line = time.monotonic()
        steps = self.loader.steps_per_epoch
        for batch in self.loader.epoch(self.progress.epoch):
            loss, lr = self._step(batch)
            total += loss
            unchecked.append((batch, loss))
            if len(unchecked) == check_steps or batch.step + 1 == steps:
                self._check(unchecked)
                unchecked.clear()
            if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                done = batch.step + 1
                seconds_a_step = (last_line - started) / done
                left = (self.config.epochs - self.progress.epoch) * steps - done
                self._say(
                    f"epoch {self.progress.epoch + 1}/{self.config.epochs} step {done}/{steps}: "
                    f"loss {float(loss):.4f}, lr {lr:.2e}, {self.config.batch_size / seconds_a_step:.1f} samples/s, "
                    f"ETA {left * seconds_a_step:.0f} s"
                )
        return float(total) / steps, lr, steps * self.config.batch_size

    def _step(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """One optimiser step; (loss of the global batch, learning rate)."""
        config, progress = self.config, self.progress
        lr = noam_lr(
            progress.step, model_size=config.model.hidden_size, warmup=config.warmup_steps, factor=config.lr_factor
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(step_seed(config.seed, self.rank, progress.step))
        target_ids = self._to_device(batch.target_ids)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(
                self._to_device(batch.global_feature).float(),
                self._to_device(batch.patch_features).float(),
                self._to_device(batch.token_ids),
            )  # (b, T, V)
        loss = self.criterion(logits, target_ids, self._to_device(batch.clip_score))
        self.optimizer.zero_grad()
        (loss * self.num_workers).backward()  # DDP averages the gradients of the workers, whose sum is wanted
        if config.clip_value:
            nn.utils.clip_grad_value_(self.parameters, config.clip_value)
        self.optimizer.step()
        progress.step += 1
        return loss.detach(), lr

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _check(self, steps: list[tuple[Batch, torch.Tensor]]) -> None:
        """Raise NonFiniteLoss on every worker alike: the loss is that of the global batch."""
        finite = torch.isfinite(torch.stack([loss for _, loss in steps])).tolist()
        if all(finite):
            return
        batch, loss = steps[finite.index(False)]
        shares = [batch.sample_ids] * self.num_workers
        if self.num_workers > 1:
            torch.distributed.all_gather_object(shares, batch.sample_ids)
        sample_ids = [sample_id for share in shares for sample_id in share if sample_id]
        raise NonFiniteLoss(
            f"loss is {float(loss)} in epoch {batch.epoch + 1}, step {batch.step + 1}, at the batch of samples "
            f"{', '.join(sample_ids)}; look at their features and clip scores, or lower lr_factor"
        )

    def _report(self, metrics: dict[str, Any], *, is_best: bool) -> None:
        """Write the epoch's checkpoint. Best first, checkpoint next, metrics.jsonl last: a run killed in between does
        the epoch again and writes the same.
        """
        if self.rank != 0:
            ray.train.report(metrics)
            return
        files = captioner_files(
            self.module,
            document={**self.run.document, "metrics": metrics},
            vocabulary=self._vocabulary_data,
            concepts=self._concepts_data,
        )
        if is_best:
            for name, data in files.items():
                self.out.write_bytes(f"{BEST}/{name}", data)
        with tempfile.TemporaryDirectory(prefix="pcm-checkpoint-") as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            torch.save(self.optimizer.state_dict(), Path(folder, OPTIMIZER_FILE))
            Path(folder, STATE_FILE).write_text(json.dumps(vars(self.progress)))
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"epoch-{self.progress.epoch:03d}",
            )
        self._write_metrics()

    def _restored(self) -> Progress:
        """Load the last checkpoint that this run reported, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Progress()
        with checkpoint.as_directory() as folder:
            self.module.load_state_dict(safetensors.torch.load_file(Path(folder, MODEL_FILE)))
            state = torch.load(Path(folder, OPTIMIZER_FILE), weights_only=True, map_location=self.device)
            self.optimizer.load_state_dict(state)
            progress = Progress(**json.loads(Path(folder, STATE_FILE).read_text()))
        self._say(f"resumed after epoch {progress.epoch}, step {progress.step}")
        return progress

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.progress.history)
        self.out.write_bytes(METRICS_KEY, lines.encode())

    def _say(self, line: str) -> None:
        if self.rank == 0:
            log.info("%s", line)


def _log_to_stderr() -> None:
    """Our own lines only: Ray forwards a worker's stderr to the driver's."""
    for package in ("cluster", "pcm"):
        logger = logging.getLogger(package)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report of every worker through the root


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed of the dropout and noise of one step on one worker: independent of everything that ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()[:8], "big") >> 1


def resolved_precision(precision: str, device_type: str) -> str:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if precision != "auto":
        return precision
    return "bfloat16" if device_type == "cuda" else "float32"
