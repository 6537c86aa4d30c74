"""Waiting for what another process does, and an actor that others wait for."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, seconds: float = 60, said: str = "it did not come to be") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


class Holds:
    """An actor that has the CPUs that it was given."""

    def ready(self) -> bool:
        return True
