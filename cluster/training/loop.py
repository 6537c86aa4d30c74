"""The training loop that every Ray Train worker runs: PCM-Net under DDP, checkpoints, exact resume.

Nothing random depends on what ran before: the row order is a function of (seed, epoch), dropout and noise of (seed,
step, row). So a checkpoint needs no generator states, and a run that was killed goes on at its last checkpoint, in the
middle of an epoch too, as if it had not been.
"""

import json
import logging
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed

from cluster.store.store import open_store
from cluster.training.checkpoints import LossLog, TrainingState, load_training_state, save_training_state
from cluster.training.data.batches import Batch, BatchShape
from cluster.training.ema import WeightAverage
from cluster.training.feed import TrainingData
from cluster.training.run_spec import RunSpec
from cluster.training.step import TrainStep
from cluster.training.trackers import Tracker, open_trackers
from cluster.training.validation import validation_cider
from pcm.captioners.captioner import captioner_files
from pcm.captioners.pcmnet.model import PCMNet
from pcm.line_timer import LineTimer
from pcm.records import FeatureShape
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

METRICS_KEY = "metrics.jsonl"
#: {"at": seconds since 1970} of the first step of a run whose first epoch is in the order of the plan.
FIRST_STEP_KEY = "first_step.json"
BEST = "best"

#: By which Ray Train keeps checkpoints: the CIDEr of an epoch; those inside an epoch have none and count for nothing.
SCORE = "score"
NO_SCORE = -1.0

FEATURE_SIZES = ("embed_dim", "patch_dim", "num_patches")

#: On a GPU the loss is read back, and checked, once in so many steps: reading it makes the GPU wait.
GPU_CHECK_STEPS = 50


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the step and the rows."""


def train_loop(loop_config: dict[str, Any]) -> str:
    """train_loop_per_worker of Ray Train. Returns "" or, the same on every worker, why training was stopped."""
    try:
        _TrainWorker(loop_config["run"]).train()
    except NonFiniteLoss as error:
        return str(error)  # not raised: Ray would start the same arithmetic again
    return ""


class _TrainWorker:
    """One rank of a run."""

    def __init__(self, run: RunSpec) -> None:
        _log_to_stderr()
        context = ray.train.get_context()
        self.run, self.config = run, run.config
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = worker_device()
        if self.device.type == "cpu":
            torch.set_num_threads(run.cpu_threads)
        self.bfloat16 = resolved_precision(self.config.precision, self.device.type) == "bfloat16"
        self.out = open_store(run.out)
        self.vocabulary = Vocabulary.from_text(run.vocabularies.words.decode())

        torch.manual_seed(self.config.seed)
        self.module = self._network().to(self.device)
        self.optimizer = torch.optim.Adam(
            [parameter for parameter in self.module.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
            fused=True,
        )
        decay = self.config.ema_decay
        self.average = WeightAverage(self.module, decay=decay) if decay else None
        self.progress = self._restored()
        model = ray.train.torch.prepare_model(
            self.module,
            move_to_device=self.device,
            parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True},
        )
        place = {"rank": self.rank, "num_workers": self.num_workers}
        self.step = TrainStep(
            self.module, model, self.optimizer, self.config, device=self.device, bfloat16=self.bfloat16, **place
        )
        shape = BatchShape(
            features=FeatureShape(**{name: getattr(self.config.model, name) for name in FEATURE_SIZES}),
            batch_size=self.config.batch_size,
            max_length=self.config.model.max_length,
            int8=self.config.feature_dtype == "int8",
            **place,
        )
        self.data = TrainingData(run, shape, self.vocabulary, device=self.device)
        if self.data.plan is None:
            self._open_data()
        self.trackers: list[Tracker] = []

    def _network(self) -> PCMNet:
        concepts = ConceptVocabulary.from_bytes(self.run.vocabularies.concepts)
        model = PCMNet(self.config.model)
        model.set_concepts(torch.from_numpy(concepts.embeddings))
        model.set_clip_head(safetensors.torch.load(self.run.vocabularies.clip_head))
        return model

    def _open_data(self) -> None:
        found = self.data.open()
        parameters = sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)
        self._say(
            f"{found}; {parameters:,} parameters; {self.num_workers} worker(s) on {self.device.type}, "
            f"{'bfloat16' if self.bfloat16 else 'float32'}"
        )

    def train(self) -> None:
        if self.rank == 0:
            self._write_metrics()
            self.trackers.append(open_trackers(self.run.out, config=self.run.document))
        try:
            while self.progress.epoch < self.config.epochs:
                self._train_and_validate()
        finally:
            for tracker in self.trackers:
                tracker.close()

    def _train_and_validate(self) -> None:
        """One epoch, or the rest of one."""
        started = time.monotonic()
        first_step = self.progress.step
        rows = self._train_epoch()
        trained = time.monotonic()
        if not self.data.is_open:
            self._open_data()
        with self.average.applied() if self.average else nullcontext():
            cider = validation_cider(
                self.module, self.vocabulary, self.data.validation, beam_size=self.config.validation_beam_size
            )
        self.progress.epoch += 1
        is_best = cider > self.progress.best_cider
        samples = (self.progress.step - first_step) * self.config.batch_size
        metrics = {
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "loss": math.fsum(row["loss"] for row in rows) / len(rows),
            "lr": rows[-1]["lr"],
            "CIDEr": cider,
            "seconds": round(trained - started, 3),
            "validation_seconds": round(time.monotonic() - trained, 3),
            "samples_per_second": round(samples / (trained - started), 2),
        }
        self.progress.history.append(metrics)
        self._say(
            f"epoch {self.progress.epoch}/{self.config.epochs}: loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, "
            f"CIDEr {cider:.4f}{' (best)' if is_best else ''}, {metrics['samples_per_second']} samples/s, "
            f"{metrics['seconds']:.1f} s + {metrics['validation_seconds']:.1f} s validation"
        )
        self._track({name: metrics[name] for name in ("CIDEr", "epoch", "samples_per_second")})
        self._save_checkpoint({**metrics, SCORE: cider}, is_best=is_best)
        if self.rank == 0:
            self._write_metrics()

    def _train_epoch(self) -> list[dict[str, float]]:
        """Train to the end of the epoch; step, loss and learning rate of all its steps."""
        progress = self.progress
        if progress.epoch > 0 and not self.data.is_open:
            self._open_data()
        steps = self.data.steps_per_epoch()
        self.module.train()
        losses = LossLog(self.out, epoch=progress.epoch + 1, until=progress.step)
        unchecked: list[tuple[Batch, torch.Tensor, float]] = []
        check_steps = GPU_CHECK_STEPS if self.device.type == "cuda" else 1
        first = progress.step - progress.epoch * steps
        timer = LineTimer()
        for batch in self.data.batches(progress.epoch, start_step=first):
            loss, lr = self.step(batch, progress.step)
            progress.step += 1
            if progress.step == 1 and self.data.plan is not None and self.rank == 0:
                self.out.write_bytes(FIRST_STEP_KEY, json.dumps({"at": time.time()}).encode())
            if self.average:
                self.average.update(progress.step)
            unchecked.append((batch, loss, lr))
            at_end = batch.last
            every = self.run.checkpoint_every_steps
            due = every is not None and progress.step % every == 0 and not at_end
            if len(unchecked) == check_steps or at_end or due:
                self._check(unchecked, losses)
                unchecked.clear()
            if at_end or due:
                self._write_losses(losses)
            if due:
                self._save_checkpoint({"step": progress.step, SCORE: NO_SCORE}, is_best=False)
            if timer.due():
                done = batch.step + 1
                seconds_a_step = timer.elapsed / (done - first)
                left = (self.config.epochs - progress.epoch) * steps - done
                self._say(
                    f"epoch {progress.epoch + 1}/{self.config.epochs} step {done}/{steps}: "
                    f"loss {float(loss):.4f}, lr {lr:.2e}, {self.config.batch_size / seconds_a_step:.1f} samples/s, "
                    f"ETA {left * seconds_a_step:.0f} s"
                )
        if not losses.rows:
            self._open_data()  # says why there is nothing to train on
        return losses.rows

    def _check(self, steps: list[tuple[Batch, torch.Tensor, float]], losses: LossLog) -> None:
        """Log the losses of the last steps. Raises NonFiniteLoss on every worker alike: they are of global batches."""
        values = torch.stack([loss for _, loss, _ in steps]).tolist()
        for (batch, _, lr), value, step in zip(steps, values, self._last_steps(len(steps)), strict=True):
            if not math.isfinite(value):
                self._stop(batch, value)
            losses.append(step=step, loss=value, lr=lr)
            self._track({"loss": value, "lr": lr}, step=step)

    def _last_steps(self, count: int) -> range:
        return range(self.progress.step - count + 1, self.progress.step + 1)

    def _stop(self, batch: Batch, loss: float) -> None:
        shares = [batch.sample_ids] * self.num_workers
        if self.num_workers > 1:
            torch.distributed.all_gather_object(shares, batch.sample_ids)
        sample_ids = [sample_id for share in shares for sample_id in share if sample_id]
        raise NonFiniteLoss(
            f"loss is {loss} in epoch {batch.epoch + 1}, step {batch.step + 1}, at the batch of samples "
            f"{', '.join(sample_ids)}; look at their features and clip scores, or lower lr_factor"
        )

    def _save_checkpoint(self, metrics: dict[str, Any], *, is_best: bool) -> None:
        """Write a checkpoint. Best first, checkpoint next, metrics.jsonl last: a run killed in between does the steps
        since the checkpoint before again and writes the same.
        """
        if self.rank != 0:
            ray.train.report(metrics)
            return
        row = {name: value for name, value in metrics.items() if name != SCORE}
        with self.average.applied() if self.average else nullcontext():
            files = captioner_files(
                self.module,
                document={**self.run.document, "metrics": row},
                vocabulary=self.run.vocabularies.words,
                concepts=self.run.vocabularies.concepts,
            )
        if is_best:
            for name, data in files.items():
                self.out.write_bytes(f"{BEST}/{name}", data)
        with tempfile.TemporaryDirectory(prefix="pcm-checkpoint-") as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            save_training_state(
                Path(folder), module=self.module, optimizer=self.optimizer, average=self.average, at=self.progress
            )
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=self.progress.checkpoint_name,
            )

    def _restored(self) -> TrainingState:
        """Load the last checkpoint that this run reported, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return TrainingState()
        with checkpoint.as_directory() as folder:
            progress = load_training_state(
                Path(folder), module=self.module, optimizer=self.optimizer, average=self.average
            )
        self._say(f"resumed after epoch {progress.epoch}, step {progress.step}")
        return progress

    def _track(self, metrics: dict[str, float], *, step: int | None = None) -> None:
        for tracker in self.trackers:
            tracker.log(self.progress.step if step is None else step, metrics)

    def _write_losses(self, losses: LossLog) -> None:
        if self.rank == 0:
            losses.write()

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


def worker_device() -> torch.device:
    """What Ray gave this worker. A GPU that torch knows nothing of (Ray was told of one, or torch has no CUDA) is none:
    said in a warning, for a CPU is slow.
    """
    if torch.cuda.is_available():
        return ray.train.torch.get_device()
    if ray.is_initialized() and ray.get_gpu_ids():  # asked outside a cluster, it would start one
        log.warning("Ray gave this worker a GPU, but torch finds none: training on the CPU")
    return torch.device("cpu")


def resolved_precision(precision: str, device_type: str) -> str:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if precision != "auto":
        return precision
    return "bfloat16" if device_type == "cuda" else "float32"
