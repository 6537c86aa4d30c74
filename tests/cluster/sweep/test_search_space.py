"""What a sweep varies: domains, their checks, and settings that depend on nothing but the seed."""

import math

import numpy as np
import pytest

from cluster.sweep.search_space import (
    ABLATIONS,
    DEFAULT_SPACE,
    Choice,
    Range,
    grid,
    optuna_distributions,
    parse_domain,
    parse_param,
    random_settings,
    search_space,
)
from cluster.training.config import TrainConfig
from pcm.errors import InputError

BASE = TrainConfig()


@pytest.mark.parametrize(
    ("spec", "domain"),
    [
        ("1,3,5", Choice((1, 3, 5))),
        ("0.5", Choice((0.5,))),
        ("batch, off", Choice(("batch", "off"))),
        ("uniform:0:0.1", Range("uniform", 0.0, 0.1)),
        ("log:0.1:2", Range("log", 0.1, 2.0)),
        ("int:1:7", Range("int", 1, 7)),
    ],
)
def test_a_spec_is_values_or_a_range(spec: str, domain: Choice | Range) -> None:
    assert parse_domain("field", spec) == domain


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("top_concepts", "write FIELD=SPEC"),
        ("top_concepts=", "write FIELD=SPEC"),
        ("tau=log:0:1", "both above 0"),
        ("tau=uniform:1:1", "LOW below HIGH"),
        ("tau=uniform:0:nan", "LOW below HIGH"),
        ("tau=uniform:1", "two numbers"),
        ("top_concepts=int:1:2.5", "two numbers"),
        ("tau=normal:0:1", "'normal' is not known"),
        ("top_concepts=1,,3", "empty or given twice"),
        ("top_concepts=1,1", "empty or given twice"),
        ("no_such_field=1,2", "not known"),
        ("top_concepts=1,two", "must be of type int"),
        ("top_concepts=uniform:1:7", "must be of type int"),
        ("top_concepts=1,5000", "at most num_concepts, 400, which comes from the data"),
        ("validation_beam_size=3,20000", "at most the size of the vocabulary, 10200"),
        ("tau=uniform:0:1", "tau 0.0: must be greater than 0"),
        ("vocab_size=5,6", "comes from the dataset"),
        ("seed=1,2", "give --seeds N"),
        ("epochs=1,2", "give --epochs N"),
    ],
)
def test_what_cannot_be_searched_is_one_line_before_any_trial(param: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        search_space(dict([parse_param(param)]), base=BASE)
    assert "\n" not in str(caught.value) and param.split("=")[0] in str(caught.value)


def test_values_that_depend_on_each_other_are_judged_together() -> None:
    """A batch of 12 in 3 parts is none of the base's 32."""
    space = search_space({"batch_size": "12,24", "grad_accumulation": "1,3"}, base=BASE)
    assert len([BASE.with_overrides(settings) for settings in grid(space)]) == 4


def test_the_default_space_and_the_ablations_fit_the_published_config() -> None:
    assert search_space(DEFAULT_SPACE, base=BASE).keys() == DEFAULT_SPACE.keys()
    sizes = {name: len(grid(search_space(specs, base=BASE))) for name, specs in ABLATIONS.items()}
    assert sizes == {"K": 7, "M": 7, "w": 6}


def test_a_grid_is_every_combination_and_takes_no_range() -> None:
    space = search_space({"top_concepts": "1,3", "focal_mode": "batch,off"}, base=BASE)
    assert [tuple(point.values()) for point in grid(space)] == [(1, "batch"), (1, "off"), (3, "batch"), (3, "off")]
    with pytest.raises(InputError, match=r"--param tau: --search grid needs values"):
        grid(search_space({"tau": "log:0.01:1"}, base=BASE))


def test_a_longer_search_begins_with_the_shorter_one() -> None:
    space = search_space(DEFAULT_SPACE, base=BASE)
    settings = random_settings(space, count=20, seed=3)
    assert settings[:5] == random_settings(space, count=5, seed=3) != random_settings(space, count=5, seed=4)


def test_samples_lie_in_their_domain_and_in_the_right_scale() -> None:
    random = np.random.default_rng(0)
    logs = [Range("log", 0.01, 100.0).sample(random) for _ in range(400)]
    assert min(logs) >= 0.01 and max(logs) <= 100 and 0.4 < np.mean(np.array(logs) < 1) < 0.6
    whole = {Range("int", 1, 3).sample(random) for _ in range(100)}
    assert whole == {1, 2, 3} and all(type(value) is int for value in whole)


def test_optuna_samples_the_same_domains() -> None:
    distributions = optuna_distributions(search_space(DEFAULT_SPACE, base=BASE))
    assert distributions["lr_factor"].log and math.isclose(distributions["lr_factor"].low, 0.2)
    assert distributions["top_concepts"].choices == (1, 3, 5, 7)
    assert (distributions["concept_threshold"].low, distributions["concept_threshold"].log) == (0.0, False)
