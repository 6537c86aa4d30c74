"""The paper's experiments: each can be trained as it says, and is compared in the paper's unit."""

import pytest

from cluster.evaluation.experiments import EXPERIMENTS, comparison, comparison_table, experiments_table
from cluster.training.config import preset
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.errors import InputError


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_preset_with_known_fields(name: str) -> None:
    experiment = EXPERIMENTS[name]
    config = preset(experiment.preset).with_overrides(experiment.overrides)
    assert "CIDEr" in experiment.paper
    backbone = "l14" if "l14" in experiment.preset else "b32"
    assert config.clip_weight in ({"l14": 4.0, "b32": 2.5}[backbone], experiment.overrides.get("clip_weight"))


def test_without_cxe_every_pair_weighs_one() -> None:
    import torch

    config = preset("coco_l14").with_overrides(EXPERIMENTS["coco_l14_base"].overrides)
    assert config.model.num_pairs == 0
    logits, targets = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    loss = CLIPWeightedCrossEntropy(**config.loss_settings)
    scores = torch.tensor([0.01, 0.2, 0.35])
    assert torch.equal(loss(logits, targets, scores), loss(logits, targets, torch.ones(3)))


def test_figures_are_compared_in_the_papers_unit() -> None:
    assert comparison("coco_l14", {"CIDEr": 1.1304, "Bleu_4": None}) == {
        "CIDEr": {"paper": 113.6, "ours": 113.0},
        "Bleu_4": {"paper": 33.6, "ours": None},
    }
    metrics = {"CIDEr": 0.7, "domains": {"in-domain": {"CIDEr": 0.655}}}
    compared = comparison("nocaps", metrics)
    assert compared["CIDEr/in-domain"] == {"paper": 66.0, "ours": 65.5}
    assert compared["CIDEr/out-domain"]["ours"] is None
    assert comparison_table("nocaps", compared).splitlines()[1].split() == ["CIDEr", "74.7", "70.0"]


def test_an_unknown_experiment_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'coco': not known; did you mean 'coco_l14'\? allowed are coco_b32"):
        comparison("coco", {})


def test_the_table_names_what_to_train() -> None:
    line = next(line for line in experiments_table().splitlines() if line.startswith("coco_b32_data20"))
    training = "--preset coco_b32 --set fraction=0.2 --set epochs=60"
    assert line.split() == ["coco_b32_data20", *training.split(), "COCO", "98.8"]


def test_a_part_of_the_captions_is_trained_on_for_as_many_steps_as_all_of_them() -> None:
    for percent in (10, 20, 40, 60, 80):
        config = preset("coco_b32").with_overrides(EXPERIMENTS[f"coco_b32_data{percent}"].overrides)
        assert config.fraction * config.epochs == pytest.approx(12)
    assert EXPERIMENTS["coco_b32_data100"].overrides == {}
