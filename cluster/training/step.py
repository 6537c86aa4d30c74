"""One optimiser step of one worker: the same for any number of workers and any division of its rows into parts."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from cluster.training.config import TrainConfig
from cluster.training.data.batches import Batch
from cluster.training.global_loss import GlobalBatchLoss, gathered
from pcm.captioners.pcmnet.method import PCMNET
from pcm.captioners.pcmnet.schedule import noam_lr
from pcm.errors import InputError
from pcm.kernels.quantised import dequantised
from pcm.kernels.row_randomness import RowRandomness


class TrainStep:
    """Forward, loss of the global batch, backward, clipping, Adam.

    Dropout and noise are functions of (seed, step, row of the global batch), so on CPUs 1, 2 and 4 workers draw the
    same; a GPU draws by (seed, step, first row of the part), which is another draw for another number of workers.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        rank: int,
        num_workers: int,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        """`model` is `module`, under DDP where there are several workers.

        Raises InputError where the config asks for torch.compile and the network has dropout or noise on a CPU.
        """
        check_compile(config, device_type=device.type)
        if config.compile != "none":
            module.compile(mode=config.compile, dynamic=False, fullgraph=True)
        self._module, self._model, self._optimizer, self._config = module, model, optimizer, config
        self._rank, self._num_workers = rank, num_workers
        self._device, self._bfloat16 = device, bfloat16
        #: torch.compile does not follow it; on a CPU only networks without random numbers are compiled.
        self._by_row = device.type == "cpu" and config.compile == "none"
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._criterion = GlobalBatchLoss(**config.loss_settings)

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, float]:
        """Optimiser step `step` of the run, from 0: (loss of the global batch, learning rate)."""
        config = self._config
        lr = noam_lr(step, model_size=config.model.hidden_size, warmup=config.warmup_steps, factor=config.lr_factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        rows = self._on_device(batch)
        loss = self._whole(rows, step) if config.grad_accumulation == 1 else self._in_parts(rows, step)
        if config.clip_value:
            nn.utils.clip_grad_value_(self._parameters, config.clip_value)
        self._optimizer.step()
        return loss, lr

    def _whole(self, rows: dict[str, Tensor], step: int) -> Tensor:
        logits = self._forward(self._model, rows, step, first_row=0)
        loss = self._criterion(logits, rows["target_ids"], rows["clip_score"])
        self._backward(loss)
        return loss.detach()

    def _in_parts(self, rows: dict[str, Tensor], step: int) -> Tensor:
        count = len(rows["target_ids"])  # b
        size = count // self._config.grad_accumulation
        starts = range(0, count, size)
        parts = [{name: tensor[start : start + size] for name, tensor in rows.items()} for start in starts]
        own = torch.cat([self._terms(part, step, start) for part, start in zip(parts, starts, strict=True)])
        everything = torch.cat(gathered(own))  # (B, 3, T)
        total = torch.zeros((), device=self._device)
        for part, start in zip(parts, starts, strict=True):
            is_last = start + size == count
            with nullcontext() if is_last else self._without_sync():
                logits = self._forward(self._model, part, step, first_row=start)
                terms = self._criterion.stacked_terms(logits, part["target_ids"], part["clip_score"])
                loss = self._criterion.part_loss(terms, everything, self._rank * count + start)
                self._backward(loss)
            total += loss.detach()
        if self._criterion.couples_rows:
            return loss.detach()
        return torch.stack(gathered(total)).sum()

    @torch.no_grad()
    def _terms(self, part: dict[str, Tensor], step: int, start: int) -> Tensor:
        """What the other parts have to know of this one before it is trained on: see GlobalBatchLoss.part_loss."""
        target_ids = part["target_ids"]
        if not self._criterion.couples_rows:
            zeros = torch.zeros(target_ids.shape, device=self._device)
            return torch.stack([zeros, zeros, (target_ids >= 0).float()], dim=1)
        logits = self._forward(self._module, part, step, first_row=start)
        return self._criterion.stacked_terms(logits, target_ids, part["clip_score"])

    def _forward(self, model: nn.Module, rows: dict[str, Tensor], step: int, *, first_row: int) -> Tensor:
        """Logits (b, T, V); `first_row` is the place of the first row in this worker's share."""
        count = len(rows["target_ids"])
        share = self._config.batch_size // self._num_workers
        place = range(self._rank * share + first_row, self._rank * share + first_row + count)
        read = rows | {
            "global_feature": rows["global_feature"].float(),
            "patch_features": dequantised(rows["patch_features"], rows["patch_scale"]),
        }
        with (
            self._randomness(step, place),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16),
        ):
            logits, _ = PCMNET.words(model, read)
        return logits

    def _randomness(self, step: int, rows: range) -> AbstractContextManager:
        """Of the network, whatever it is made of, for these rows of the global batch."""
        if self._by_row:
            return RowRandomness([row_seed(self._config.seed, step, row) for row in rows])
        torch.manual_seed(row_seed(self._config.seed, step, rows.start))
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        (loss * self._num_workers).backward()  # DDP averages the gradients of the workers, whose sum is wanted

    def _without_sync(self) -> AbstractContextManager:
        return self._model.no_sync() if hasattr(self._model, "no_sync") else nullcontext()  # type: ignore[operator]

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        names = ("global_feature", "patch_features", "patch_scale", "clip_score", "token_ids", "target_ids")
        arrays = {name: getattr(batch, name) for name in names}
        if self._device.type == "cpu" and self._config.compile == "none":
            # Padding changes no result but takes time; compiled kernels and a GPU's want one shape.
            length = self._longest_caption(batch)
            arrays |= {name: arrays[name][:, :length] for name in ("token_ids", "target_ids")}
        return {name: self._to_device(array) for name, array in arrays.items()}

    def _longest_caption(self, batch: Batch) -> int:
        """Of the global batch, end included: all workers cut alike."""
        longest = torch.tensor(int((batch.target_ids >= 0).sum(axis=1).max()))
        if self._num_workers > 1:
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
        return int(longest)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def check_compile(config: TrainConfig, *, device_type: str) -> None:
    """Raises InputError where torch.compile cannot follow the network's random numbers."""
    if config.compile != "none" and device_type == "cpu" and config.model.is_random:
        raise InputError(
            f"compile = {config.compile!r}: for GPUs; on a CPU dropout and noise have a generator a row, which "
            "torch.compile does not follow; set compile=none"
        )


def row_seed(seed: int, step: int, row: int) -> int:
    """Seed of the dropout and noise of one row of a step's global batch: independent of all that ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{row}".encode()).digest()[:8], "big") >> 1
