"""The published learning-rate schedule."""

import json

import pytest

from pcm.captioners.pcmnet.schedule import noam_lr
from tests.helpers.paths import DATA

GOLDEN = json.loads((DATA / "noam_lr.json").read_text())


@pytest.mark.parametrize("step", sorted(GOLDEN["lr"], key=int))
def test_learning_rate_matches_the_published_scheduler(step: str) -> None:
    ours = noam_lr(int(step), model_size=GOLDEN["model_size"], warmup=GOLDEN["warmup"], factor=GOLDEN["factor"])
    assert ours == pytest.approx(GOLDEN["lr"][step], abs=1e-12, rel=1e-12)


def test_rate_rises_until_the_last_warm_up_step_and_falls_after_it() -> None:
    rates = [noam_lr(step, model_size=64, warmup=10) for step in range(30)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_factor_scales_the_rate() -> None:
    assert noam_lr(5, model_size=64, warmup=10, factor=3.0) == pytest.approx(3 * noam_lr(5, model_size=64, warmup=10))


@pytest.mark.parametrize(("step", "warmup"), [(-1, 10), (0, 0)])
def test_impossible_steps_are_refused(step: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="steps count from 0"):
        noam_lr(step, model_size=64, warmup=warmup)
