"""The training loop that every Ray Train worker runs: PCM-Net under DDP, checkpoints, exact resume.

Nothing random depends on what ran before: the row order is a function of (seed, epoch), dropout and noise of (seed,
step, row). So a checkpoint needs no generator states, and a run that was killed goes on at its last checkpoint, in the
middle of an epoch too, as if it had not been.
"""

import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from cluster.dataset.rows import not_finite_error, share_checks
from cluster.numbers import duration, spent
from cluster.training.checkpoints import NO_SCORE, SCORE, best_epoch
from cluster.training.config import TrainConfig
from cluster.training.data.batches import Batch
from cluster.training.reporting import LossLog
from cluster.training.run_spec import RunSpec
from cluster.training.validation import validation_cider
from cluster.training.worker import TrainWorker, set_up_worker
from pcm.line_timer import LineTimer
from pcm.model_faults import enough_memory

#: On a GPU the loss is read back, and checked, once in so many steps: reading it makes the GPU wait. Their batches are
#: kept until then, to name the rows of a bad one; of large batches fewer, so many bytes together.
GPU_CHECK_STEPS = 50
GPU_CHECK_BYTES = 512 * 2**20

#: Of the batch whose loss is not finite: it may be thousands.
_SAMPLES_NAMED = 3


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the step and the rows."""


def train_loop(loop_config: dict[str, Any]) -> str:
    """train_loop_per_worker of Ray Train. Returns "" or, the same on every worker, why training was stopped."""
    run: RunSpec = loop_config["run"]
    try:
        with share_checks(Path(tempfile.gettempdir(), run.checks)):
            _train(set_up_worker(run))
    except NonFiniteLoss as error:
        return str(error)  # not raised: Ray would start the same arithmetic again
    return ""


def _less_memory(config: TrainConfig, workers: int) -> str:
    rows = config.batch_size // workers // config.grad_accumulation
    return (
        f"with {rows} rows at once on each of {workers} worker(s); set grad_accumulation higher (it is "
        f"{config.grad_accumulation}) or batch_size lower ({config.batch_size}), or give it more or larger GPUs"
    )


def _train(worker: TrainWorker) -> None:
    worker.reporter.write_metrics(worker.progress.history)
    worker.reporter.open_trackers(worker.run)
    try:
        while worker.progress.epoch < worker.config.epochs:
            _train_and_validate(worker)
    finally:
        worker.reporter.close()


def _train_and_validate(worker: TrainWorker) -> None:
    """One epoch, or the rest of one."""
    progress, config = worker.progress, worker.config
    started = time.monotonic()
    first_step = progress.step
    began = started - progress.seconds
    losses = _train_epoch(worker, began=began)
    trained = time.monotonic()
    if not worker.data.is_open:
        worker.open_data()
    less = (
        f"in validation; set validation_beam_size lower (it is {config.validation_beam_size}), or give it larger GPUs"
    )
    with worker.average.applied() if worker.average else nullcontext(), enough_memory(less):
        cider = validation_cider(
            worker.module, worker.vocabulary, worker.data.validation, beam_size=config.validation_beam_size
        )
    progress.epoch += 1
    progress.seconds = 0.0
    samples = (progress.step - first_step) * config.batch_size
    metrics: dict[str, Any] = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss": math.fsum(losses.loss) / len(losses.loss),
        "lr": losses.lr[-1],
        "CIDEr": cider,
        "seconds": round(trained - began, 3),
        "validation_seconds": round(time.monotonic() - trained, 3),
        "samples_per_second": round(samples / (trained - started), 2),
        "group_sizes": list(progress.group_sizes),
    }
    progress.history.append(metrics)
    is_best = best_epoch(progress.history) is metrics
    worker.reporter.say(
        f"epoch {progress.epoch}/{config.epochs}: loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, "
        f"CIDEr {cider:.4f}{' (best)' if is_best else ''}, {metrics['samples_per_second']} samples/s, "
        f"{spent(metrics['seconds'])} + {spent(metrics['validation_seconds'])} validation"
    )
    tracked = {name: metrics[name] for name in ("CIDEr", "epoch", "samples_per_second")}
    worker.reporter.track(progress.step, tracked | {"workers": worker.num_workers})
    worker.checkpoints.save({**metrics, SCORE: cider}, progress, is_best=is_best)
    worker.reporter.write_metrics(progress.history)


def _train_epoch(worker: TrainWorker, *, began: float) -> LossLog:
    """Train to the end of the epoch; step, loss and learning rate of all its steps. `began`: when the epoch would have
    begun, had it not been interrupted."""
    progress, config = worker.progress, worker.config
    if progress.epoch > 0 and not worker.data.is_open:
        worker.open_data()
    steps = worker.data.steps_per_epoch()
    worker.module.train()
    losses = LossLog(worker.out, epoch=progress.epoch + 1, until=progress.step)
    unchecked: list[tuple[Batch, torch.Tensor, float]] = []
    first = progress.step - (progress.history[-1]["step"] if progress.history else 0)  # of this epoch
    timer = LineTimer()
    less = _less_memory(config, worker.num_workers)
    for batch in worker.data.batches(progress.epoch, start_step=first):
        with enough_memory(less):  # raised, and not returned: the other workers wait for this one
            loss, lr = worker.step(batch, progress.step)
        progress.step += 1
        if progress.step == 1 and worker.data.plan is not None:
            worker.reporter.write_first_step()
        if worker.average:
            worker.average.update(progress.step)
        unchecked.append((batch, loss, lr))
        at_end = batch.last
        every = worker.run.checkpoint_every_steps
        due = every is not None and progress.step % every == 0 and not at_end
        if len(unchecked) >= _check_steps(worker.device, batch) or at_end or due:
            _check(worker, unchecked, losses)
            unchecked.clear()
        if at_end or due:
            worker.reporter.write_losses(losses, at_end=at_end)
        if due:
            progress.seconds = time.monotonic() - began
            worker.checkpoints.save({"step": progress.step, SCORE: NO_SCORE}, progress, is_best=False)
        if timer.due():
            done = batch.step + 1
            seconds_a_step = timer.elapsed / (done - first)
            epochs_left = config.epochs - progress.epoch
            left, without = (epochs_left * steps - done) * seconds_a_step, " without validation"
            if progress.history:
                left, without = left + epochs_left * progress.history[-1].get("validation_seconds", 0.0), ""
            worker.reporter.say(
                f"epoch {progress.epoch + 1}/{config.epochs} step {done}/{steps}: "
                f"loss {float(loss):.4f}, lr {lr:.2e}, {config.batch_size / seconds_a_step:.1f} samples/s, "
                f"ETA {duration(left)}{without}"
            )
    if not losses.step:
        worker.open_data()  # says why there is nothing to train on
    return losses


def _check_steps(device: torch.device, batch: Batch) -> int:
    """In how many steps the loss is checked once; on every rank the same, for its batches are of one shape."""
    return 1 if device.type != "cuda" else max(1, min(GPU_CHECK_STEPS, GPU_CHECK_BYTES // batch.nbytes))


def _check(worker: TrainWorker, steps: list[tuple[Batch, torch.Tensor, float]], losses: LossLog) -> None:
    """Log the losses of the last steps. Raises NonFiniteLoss on every worker alike: they are of global batches."""
    values = torch.stack([loss for _, loss, _ in steps]).tolist()
    last_steps = range(worker.progress.step - len(steps) + 1, worker.progress.step + 1)
    for (batch, _, lr), value, step in zip(steps, values, last_steps, strict=True):
        if not math.isfinite(value):
            _stop(worker, batch, value)
        losses.append(step=step, loss=value, lr=lr)
        worker.reporter.track(step, {"loss": value, "lr": lr})


def _stop(worker: TrainWorker, batch: Batch, loss: float) -> None:
    """Raises InputError where rows of the global batch are damaged, else NonFiniteLoss; on every worker alike.

    Looked for only now: a look at every batch would cost a part of each step.
    """
    shares = [(batch.sample_ids, batch.damaged())] * worker.num_workers
    if worker.num_workers > 1:
        torch.distributed.all_gather_object(shares, (batch.sample_ids, batch.damaged()))
    if damaged := [place for _, share in shares for place in share]:
        raise not_finite_error(damaged)
    sample_ids = [sample_id for share, _ in shares for sample_id in share if sample_id]
    others = len(sample_ids) - _SAMPLES_NAMED
    more = f" and {others:,} others" if others > 0 else ""
    raise NonFiniteLoss(
        f"loss is {loss} in epoch {batch.epoch + 1}, step {batch.step + 1}, at the batch of samples "
        f"{', '.join(sample_ids[:_SAMPLES_NAMED])}{more}, whose features are finite; lower lr_factor"
    )
