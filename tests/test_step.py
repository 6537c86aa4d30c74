"""One optimiser step is the same for any number of workers and parts, dropout and noise included."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tiny_dataset import TINY, write_dataset

from cluster.dataset import load_manifest
from cluster.ema import WeightAverage
from cluster.loader import Part, ShardLoader
from cluster.mixture import DataSource, common_vocabularies, open_training_sets
from cluster.selection import all_rows
from cluster.step import TrainStep, row_seed
from cluster.storage import open_store
from cluster.trainconfig import TrainConfig
from pcm.model import PCMNet
from pcm.vocabulary import Vocabulary

STEPS = 12
#: Relative, of losses after some steps: float32 sums in another order, and Adam divides by small second moments.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("step") / "data", tiny_clip, rows=45, shard_size=12)


def losses(data: Path, *, rank: int = 0, num_workers: int = 1, **overrides) -> list[float]:
    """Of the first steps of a run whose only disturbance is how it is spread; the last batch of an epoch is short."""
    torch.set_num_threads(1)
    sets = open_training_sets([DataSource(str(data))])
    vocabularies, features = common_vocabularies(sets), load_manifest(open_store(data)).features
    vocabulary = Vocabulary.from_text(vocabularies.words.decode())
    config = TrainConfig().with_overrides(TINY | {"warmup_steps": 400, "window_shards": 4} | overrides)
    config = config.for_dataset(vocab_size=len(vocabulary), features=features, num_concepts=9)
    torch.manual_seed(0)
    module = PCMNet(config.model)
    module.set_concepts(torch.randn(9, features.embed_dim))
    module.train()
    model = torch.nn.parallel.DistributedDataParallel(module) if num_workers > 1 else module
    place = {"rank": rank, "num_workers": num_workers}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
    step = TrainStep(module, model, optimizer, config, device=torch.device("cpu"), bfloat16=False, **place)
    loader = ShardLoader(
        [Part(sets[0].store, all_rows(sets[0].manifest))],
        features=features,
        vocabulary=vocabulary,
        batch_size=config.batch_size,
        max_length=config.model.max_length,
        lanes=config.window_shards,
        seed=config.seed,
        **place,
    )
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    return [float(step(batch, number)[0]) for number, batch in enumerate(batches[:STEPS])]


def _rank_losses(rank: int, num_workers: int, data: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{num_workers}", rank=rank, world_size=num_workers
    )
    found = {parts: losses(Path(data), rank=rank, num_workers=num_workers, grad_accumulation=parts) for parts in (1, 2)}
    torch.save(found, f"{folder}/{num_workers}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_two_and_four_workers_have_the_same_losses_with_dropout(data: Path, tmp_path: Path) -> None:
    alone = losses(data)
    assert alone != pytest.approx(losses(data, seed=99), rel=TOLERANCE)
    for num_workers in (2, 4):
        torch.multiprocessing.spawn(_rank_losses, args=(num_workers, str(data), str(tmp_path)), nprocs=num_workers)
        for rank in range(num_workers):
            found = torch.load(tmp_path / f"{num_workers}-{rank}.pt")
            assert found[1] == pytest.approx(alone, rel=TOLERANCE), f"{num_workers} workers"
            assert found[2] == pytest.approx(alone, rel=TOLERANCE), f"{num_workers} workers, two parts each"


@pytest.mark.parametrize("focal_mode", ["batch", "sentence", "word", "off"])
def test_accumulated_gradients_are_those_of_the_whole_batch(data: Path, focal_mode: str) -> None:
    whole = losses(data, focal_mode=focal_mode)
    assert losses(data, focal_mode=focal_mode, grad_accumulation=4) == pytest.approx(whole, rel=TOLERANCE)


def test_row_seeds_differ_by_run_step_and_row() -> None:
    seeds = {row_seed(seed, step, row) for seed in range(3) for step in range(3) for row in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_average_follows_its_recurrence_and_swaps_back() -> None:
    module = torch.nn.Linear(3, 2)
    average = WeightAverage(module, decay=0.5)
    expected = module.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    raw = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    torch.testing.assert_close(module.weight.detach(), raw, rtol=0, atol=0)
    torch.testing.assert_close(average.average["weight"], expected)
