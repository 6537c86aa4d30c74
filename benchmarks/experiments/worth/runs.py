"""One training and its test, in this process: the product's own loader, network, training step and beam search.

Ray Train is left out, so a run takes tens of seconds: its workers would do the same steps (cluster.training.loop), but
start, checkpoint and validate. Here the weights at the end are tested, averaged (EMA), and no epoch is picked. A result
is a small JSON file under OUT/worth/results, named by the digest of all that its numbers depend on. A run that is
interrupted leaves nothing and is done again.
"""

import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.results import file_digest, key_of, write_result
from benchmarks.experiments.settings import PRESET
from benchmarks.experiments.worth.pictures import Pictures, data_folder, load_pictures, said, worth_folder
from benchmarks.experiments.worth.settings import BASE, CLIP_FACTOR, DRAWN, NETWORKS, NO_CXE, VERSION, Setting
from cluster.dataset.documents import load_manifest
from cluster.store.store import open_store
from cluster.sweep.sweep import without_paths
from cluster.training.data.batches import Batch, BatchShape
from cluster.training.data.mixture import open_training_sets
from cluster.training.data.selection import all_rows
from cluster.training.data.shuffled import Part, ShardLoader
from cluster.training.ema import WeightAverage
from cluster.training.request import TrainRequest
from cluster.training.run_spec import RunSpec
from cluster.training.step import TrainStep
from cluster.training.train import planned_run
from cluster.training.worker import build_network, build_optimizer
from pcm.captioners.captioner import decode_captions
from pcm.captioners.pcmnet.config import BEAM_SIZE
from pcm.captioners.pcmnet.model import PCMNet
from pcm.records import FeatureShape
from pcm.text.metrics import cider_each
from pcm.text.vocabulary import Vocabulary

#: The loss is kept as means of so many steps.
LOSS_STEPS = 50


@dataclass(frozen=True)
class Run:
    """A setting with a seed, known by the digest of what its numbers depend on."""

    setting: Setting
    seed: int
    steps: int
    key: str
    spec: RunSpec


def planned(setting: Setting, seed: int, out: Path, *, steps: int, lr_factor: float) -> Run:
    """The run, of so many steps, or as many times as the setting says; raises InputError where its data is not made."""
    steps *= setting.longer
    fields, weighted = NETWORKS[setting.network]
    request = TrainRequest(
        data=str(data_folder(out, setting.painter, setting.data)),
        out=str(worth_folder(out)),
        preset=PRESET,
        overrides={
            **BASE,
            "clip_weight": clip_weight(out, setting, weighted=weighted),
            **fields,
            "lr_factor": lr_factor,
            "seed": seed,
        },
        device="cpu",
    )
    spec = planned_run(request, cpus=1)
    identity = {
        "version": VERSION,
        "steps": steps,
        "train": spec.document["train"],
        "datasets": without_paths(spec.document["datasets"]),
        "pictures": _digest(worth_folder(out) / "pictures" / "test.npz"),
    }
    return Run(setting, seed, steps, key_of(identity, digits=16), spec)


def clip_weight(out: Path, setting: Setting, *, weighted: bool) -> float:
    """w of eq. 11, from what the painter drew before anything was refined."""
    if not weighted:
        return NO_CXE
    drawn = load_manifest(open_store(data_folder(out, setting.painter, DRAWN)))
    return round(CLIP_FACTOR / (drawn.clip_score_mean or 1.0), 4)


_digest = functools.cache(file_digest)


def do_run(run: Run, out: Path, test: Pictures) -> dict[str, Any]:
    """Train, caption the test pictures, write the result."""
    started = time.process_time()
    trained = Training(run)
    trained.to_step(run.steps)
    busy = time.process_time()
    found = trained.tested_on(test)
    result = {
        "setting": asdict(run.setting),
        "seed": run.seed,
        "steps": run.steps,
        **found,
        "loss": trained.losses(),
        "cpu_seconds": {"training": round(busy - started, 1), "testing": round(time.process_time() - busy, 1)},
        "train": run.spec.document["train"],
        "datasets": without_paths(run.spec.document["datasets"]),
    }
    write_result(worth_folder(out), run.key, result)
    return result


class Training:
    """One network while it is trained. A function of its run alone: the same run gives the same weights."""

    def __init__(self, run: Run) -> None:
        config = run.spec.config
        torch.manual_seed(config.seed)  # of the initial weights: the same for all settings of one vocabulary
        self._module: PCMNet = build_network(run.spec)
        optimizer = build_optimizer(self._module, config)
        self._average = WeightAverage(self._module, decay=config.ema_decay)
        self._step = TrainStep(
            self._module, self._module, optimizer, config, rank=0, num_workers=1, device=torch.device("cpu"),
            bfloat16=False,
        )  # fmt: skip
        self._vocabulary = Vocabulary.from_text(run.spec.vocabularies.words.decode())
        self._batches = _batches(run.spec, self._vocabulary)
        self._losses: list[float] = []

    def to_step(self, steps: int) -> None:
        """Train until so many steps are done in all."""
        self._module.train()
        for number in range(len(self._losses), steps):
            loss, _ = self._step(next(self._batches), number)
            self._average.update(number + 1)
            self._losses.append(float(loss))

    def tested_on(self, pictures: Pictures) -> dict[str, Any]:
        """Of the averaged weights: captions, and by picture cider (a fraction), said and seen_said: how many of the
        scene's nouns, and of those that the classifier finds in the picture, the caption names."""
        self._module.eval()
        with self._average.applied():
            decoded = decode_captions(
                self._module, self._vocabulary, pictures.global_feature, pictures.patch_features, beam_size=BEAM_SIZE
            )
        captions = [caption for caption, _ in decoded]
        each = cider_each({str(n): text for n, text in enumerate(captions)}, pictures.references_by_id())
        return {
            "captions": captions,
            "cider": [round(each[str(number)], 4) for number in range(len(pictures))],
            "said": list(map(said, captions, pictures.nouns)),
            "seen_said": list(map(said, captions, pictures.recognised)),
        }

    def losses(self) -> list[float]:
        """Means of every LOSS_STEPS steps."""
        parts = [self._losses[start : start + LOSS_STEPS] for start in range(0, len(self._losses), LOSS_STEPS)]
        return [round(float(np.mean(part)), 4) for part in parts]


def _batches(spec: RunSpec, vocabulary: Vocabulary) -> Iterator[Batch]:
    """Epoch after epoch, in the product's order of the run's seed."""
    (data,) = open_training_sets(spec.data)
    config = spec.config
    shape = BatchShape(
        features=FeatureShape(
            embed_dim=config.model.embed_dim, patch_dim=config.model.patch_dim, num_patches=config.model.num_patches
        ),
        batch_size=config.batch_size,
        max_length=config.model.max_length,
    )
    loader = ShardLoader([Part(data.store, all_rows(data.manifest))], shape, vocabulary, seed=config.seed)
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def test_pictures(out: Path) -> Pictures:
    return load_pictures(out, "test")
