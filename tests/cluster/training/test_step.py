"""One optimiser step is the same for any number of workers and parts, dropout and noise included."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import VOCABULARY_KEY
from cluster.store.store import open_store
from cluster.training.config import TrainConfig
from cluster.training.data.batches import BatchShape
from cluster.training.data.selection import all_rows
from cluster.training.data.shuffled import Part, ShardLoader
from cluster.training.ema import WeightAverage
from cluster.training.step import TrainStep, row_seed
from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError
from pcm.text.vocabulary import Vocabulary

STEPS = 12
WORKERS = 4  # two are trained with in test_train
#: A network of seconds; tiny_dataset's, which the spawned workers need not import.
SMALL = {
    "batch_size": 8, "warmup_steps": 400, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "max_length": 12,
}  # fmt: skip
NOTHING_RANDOM = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "visual_dropout": 0.0, "word_dropout": 0.0, "output_dropout": 0.0,
    "noise_variance": 0.0,
}  # fmt: skip
#: Relative, of losses after some steps: float32 sums in another order, and Adam divides by small second moments.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    from tests.helpers.tiny_dataset import write_dataset

    return write_dataset(tmp_path_factory.mktemp("step") / "data", tiny_clip, rows=45, shard_size=12)


def losses(data: Path, *, rank: int = 0, num_workers: int = 1, **overrides) -> list[float]:
    """Of the first steps of a run whose only disturbance is how it is spread; the last batch of an epoch is short."""
    torch.set_num_threads(1)
    store = open_store(data)
    manifest, vocabulary = load_manifest(store), Vocabulary.load(data / VOCABULARY_KEY)
    features = manifest.features
    config = TrainConfig().with_overrides(SMALL | overrides)
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
        [Part(store, all_rows(manifest))],
        BatchShape(
            features=features,
            batch_size=config.batch_size,
            max_length=config.model.max_length,
            int8=config.feature_dtype == "int8",
            **place,
        ),
        vocabulary,
        seed=config.seed,
    )
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    return [float(step(batch, number)[0]) for number, batch in enumerate(batches[:STEPS])]


def _rank_losses(rank: int, data: str, folder: str, num_workers: int, runs: list[dict]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers
    )
    found = [losses(Path(data), rank=rank, num_workers=num_workers, **overrides) for overrides in runs]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def on_workers(data: Path, folder: Path, num_workers: int, *runs: dict) -> list[list[list[float]]]:
    """For each rank the losses of each run."""
    torch.multiprocessing.spawn(_rank_losses, (str(data), str(folder), num_workers, list(runs)), nprocs=num_workers)
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_workers)]


def test_four_workers_have_the_losses_of_one_with_dropout_and_with_two_parts_each(data: Path, tmp_path: Path) -> None:
    alone = losses(data)
    assert alone != pytest.approx(losses(data, seed=99), rel=TOLERANCE)
    for whole, in_parts in on_workers(data, tmp_path, WORKERS, {"grad_accumulation": 1}, {"grad_accumulation": 2}):
        assert whole == pytest.approx(alone, rel=TOLERANCE)
        assert in_parts == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.parametrize("focal_mode", ["batch", "sentence", "word", "off"])
def test_accumulated_gradients_are_those_of_the_whole_batch(data: Path, focal_mode: str) -> None:
    whole = losses(data, focal_mode=focal_mode)
    assert losses(data, focal_mode=focal_mode, grad_accumulation=4) == pytest.approx(whole, rel=TOLERANCE)


@pytest.mark.slow
def test_the_compiled_network_is_one_graph_and_trains_alike(data: Path) -> None:
    plain = losses(data, **NOTHING_RANDOM)
    assert losses(data, compile="default", **NOTHING_RANDOM) == pytest.approx(plain, rel=TOLERANCE)


@pytest.mark.slow
def test_two_workers_train_the_compiled_network_alike(data: Path, tmp_path: Path) -> None:
    plain = losses(data, **NOTHING_RANDOM)
    for (found,) in on_workers(data, tmp_path, 2, {"compile": "default", **NOTHING_RANDOM}):
        assert found == pytest.approx(plain, rel=TOLERANCE)


def test_compiling_is_refused_where_dropout_has_a_generator_a_row(data: Path) -> None:
    with pytest.raises(InputError, match=r"compile = 'default': for GPUs; .* set compile=none"):
        losses(data, compile="default", **NOTHING_RANDOM | {"word_dropout": 0.1})


def test_eight_bit_features_train_nearly_alike(data: Path) -> None:
    exact = losses(data)
    rounded = losses(data, feature_dtype="int8")
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact


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
