"""Questions to the monitor whose answers come late."""

import pytest
import ray

from cluster.generation.stages.asking import ask


class Late:
    """Answers when it has been asked something else meanwhile, as a connection that is lost is noticed then."""

    def __init__(self) -> None:
        self._others = 0

    async def answer(self, others: int, *, says: str) -> str:
        import asyncio

        while self._others < others:
            await asyncio.sleep(0.01)
        return says

    async def busy(self) -> int:
        self._others += 1
        return 0


def test_who_waits_long_sends_something_and_gets_the_answer(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.generation.stages.asking.NO_ANSWER_SECONDS", 0.2)
    late = ray.remote(Late).options(num_cpus=0).remote()
    assert ask(late, "answer", 2, says="yes") == "yes"
    ray.kill(late)


def test_an_answer_that_comes_at_once_is_all_that_is_asked_for(ray_session: None) -> None:
    late = ray.remote(Late).options(num_cpus=0).remote()
    assert ask(late, "answer", 0, says="yes") == "yes"
    ray.kill(late)
