"""Models of an actor: what is worth another try, and what is not."""

from collections.abc import Callable

import pytest

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages import loading
from cluster.generation.stages.loading import Models
from cluster.generation.stages.monitor import start_monitor
from cluster.store.retries import with_retries


def no_answer() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


def access_denied() -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(("fault", "tries"), [(no_answer, 3), (access_denied, 1)])
def test_a_store_that_does_not_answer_is_asked_again_and_one_that_refuses_is_not(
    fault: Callable[[], None], tries: int, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    monkeypatch.setattr(loading, "FIRST_LOAD_PAUSE", 0.0)
    tried = []

    def fetch() -> None:
        tried.append(1)
        if len(tried) < 3:
            with_retries(fault, place="s3://weights")

    models = Models(start_monitor(FaultPolicy()), "a generator", fetch)
    for _ in range(3):
        models.load()
    assert (len(tried), models.loaded) == (tries, tries == 3)
    assert ("s3://weights: access refused" in models.left_out) is not models.loaded
