"""One worker of a run, set up: device, network, optimiser, checkpoint, data."""

import logging
import sys
from dataclasses import dataclass, replace

import ray.train
import ray.train.torch
import safetensors.torch
import torch

from cluster.gpu_share import keep_to_shared_gpu, worker_has_gpu
from cluster.numbers import LOG_TIME
from cluster.ray_internals import LOOP_ERRORS
from cluster.releases import check_releases
from cluster.session import is_no_user_error
from cluster.store.store import Store, open_store
from cluster.training.checkpoints import Checkpoints, TrainingState
from cluster.training.config import TrainConfig
from cluster.training.data.batches import BatchShape
from cluster.training.ema import WeightAverage
from cluster.training.feed import TrainingData
from cluster.training.init_from import load_weights
from cluster.training.reporting import Reporter
from cluster.training.run_record import INIT_FROM
from cluster.training.run_spec import RunSpec
from cluster.training.step import TrainStep
from pcm.captioners.pcmnet.model import PCMNet
from pcm.precision import is_slow_in_bfloat16, whole_float32
from pcm.records import FeatureShape
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

FEATURE_SIZES = ("embed_dim", "patch_dim", "num_patches")


@dataclass(frozen=True, kw_only=True)
class TrainWorker:
    """One rank of a run. Its parts change as training goes on: weights, optimiser state, progress."""

    run: RunSpec
    rank: int
    num_workers: int
    device: torch.device
    bfloat16: bool
    out: Store  # of the run
    vocabulary: Vocabulary
    module: PCMNet  # without DDP around it
    average: WeightAverage | None
    step: TrainStep
    data: TrainingData
    checkpoints: Checkpoints
    progress: TrainingState
    reporter: Reporter

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    def open_data(self) -> None:
        """Look at the datasets, and say what there is. Raises InputError where there is nothing to train on, and where
        the rows of a stream are others than those that the run began on.
        """
        found = self.data.open()
        if self.data.plan is not None:
            self.progress.keep_to(self.data.rows_digest, dataset=self.run.data[0].uri)
        parameters = sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)
        self.reporter.say(
            f"{found}; {parameters:,} parameters; {self.num_workers} worker(s) on {self.device.type}, "
            f"{'bfloat16' if self.bfloat16 else 'float32'}"
        )


def set_up_worker(run: RunSpec) -> TrainWorker:
    """This process as a worker of Ray Train: at the run's last checkpoint, where it has one."""
    check_releases()
    _log_to_stderr()
    config = run.config
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = worker_device(run.device)
    if device.type == "cpu":
        torch.set_num_threads(run.cpu_threads)
    bfloat16 = resolved_precision(config.precision, device.type) == "bfloat16"
    out = open_store(run.out)
    reporter = Reporter(out, is_first=rank == 0)
    vocabulary = Vocabulary.from_text(run.vocabularies.words.decode())

    torch.manual_seed(config.seed)
    # What it began with may have been trained on, or be gone; a checkpoint has all weights.
    goes_on = ray.train.get_checkpoint() is not None
    module = build_network(replace(run, init_from=None) if goes_on else run).to(device)
    optimizer = build_optimizer(module, config)
    average = WeightAverage(module, decay=config.ema_decay) if config.ema_decay else None
    checkpoints = Checkpoints(run, out, module=module, optimizer=optimizer, average=average, is_first=rank == 0)
    progress = checkpoints.restore()
    progress.begin_group(num_workers)
    if progress.step:
        reporter.say(f"resumed after epoch {progress.epoch}, step {progress.step}")
    elif bfloat16 and is_slow_in_bfloat16(device.type):
        reporter.say(
            f"{torch.cuda.get_device_name()}: has no bfloat16 of its own, and is slow in it; begin with --set "
            "precision=float32 instead"
        )
    model = ray.train.torch.prepare_model(
        module,
        move_to_device=device,
        parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True},
    )
    step = TrainStep(
        module, model, optimizer, config, rank=rank, num_workers=num_workers, device=device, bfloat16=bfloat16
    )
    shape = BatchShape(
        features=FeatureShape(**{name: getattr(config.model, name) for name in FEATURE_SIZES}),
        batch_size=config.batch_size,
        max_length=config.model.max_length,
        int8=config.feature_dtype == "int8",
        rank=rank,
        num_workers=num_workers,
    )
    worker = TrainWorker(
        run=run,
        rank=rank,
        num_workers=num_workers,
        device=device,
        bfloat16=bfloat16,
        out=out,
        vocabulary=vocabulary,
        module=module,
        average=average,
        step=step,
        data=TrainingData(run, shape, vocabulary, device=device),
        checkpoints=checkpoints,
        progress=progress,
        reporter=reporter,
    )
    if worker.data.plan is None:
        worker.open_data()
    return worker


def build_network(run: RunSpec) -> PCMNet:
    concepts = ConceptVocabulary.from_bytes(run.vocabularies.concepts)
    model = PCMNet(run.config.model)
    model.set_concepts(torch.from_numpy(concepts.embeddings))
    model.set_clip_head(safetensors.torch.load(run.vocabularies.clip_head))
    if run.init_from is not None:
        load_weights(model, run.init_from, sha256=run.document[INIT_FROM]["sha256"])
    return model


def build_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=0.0,  # each step sets its own
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def worker_device(asked: str = "auto") -> torch.device:
    """The CPU where that is asked for, else what Ray gave this worker. A GPU that torch knows nothing of (Ray was told
    of one, or torch has no CUDA) is none: said in a warning, for a CPU is slow.
    """
    if asked == "cpu" or not worker_has_gpu("training"):
        return torch.device("cpu")
    keep_to_shared_gpu()
    whole_float32()
    return ray.train.torch.get_device()


def resolved_precision(precision: str, device_type: str) -> str:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if precision != "auto":
        return precision
    return "bfloat16" if device_type == "cuda" else "float32"


def _log_to_stderr() -> None:
    """Our own lines only: Ray forwards a worker's stderr to the driver's, which says the user's errors in one line."""
    for package in ("cluster", "pcm"):
        logger = logging.getLogger(package)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt=LOG_TIME))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report of every worker through the root
    LOOP_ERRORS.addFilter(is_no_user_error)
