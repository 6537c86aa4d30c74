"""Models that an actor loads in its own time: tried again where that fails, then left to other actors."""

import gc
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.generation.stages.asking import ask
from pcm.errors import InputError, OneLineError, typed_first_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

FIRST_LOAD_PAUSE, LONGEST_LOAD_PAUSE = 1.0, 60.0  # seconds before a model is loaded again, with jitter


class Models:
    """The models of one actor. The monitor is told what fails, and says when the run stops for it: one machine with a
    fault ends no run."""

    def __init__(self, monitor: "ActorHandle", actor: str, load: Callable[[], None], *, scores: bool = False) -> None:
        """`load`: raises a OneLineError that does not pass where another try would not help: the monitor's too, of an
        actor that is left out. `scores`: this is an actor of CLIP alone, whose start the monitor is told of here."""
        self._monitor, self._actor, self._load, self._scores = monitor, actor, load, scores
        self._pause = FIRST_LOAD_PAUSE
        self.loaded = False
        self.left_out = ""  # why

    def load(self) -> None:
        """Try once, unless they are loaded; one that is left out says only that. Waits a while where that fails."""
        if self.loaded or self.left_out:
            self.say_left_out()
            return
        try:
            if self._scores and (no := ask(self._monitor, "start", self._actor, this_place(), scores=True)):
                raise InputError(no)
            self._load()
            self.loaded = True
        except Exception as error:
            if isinstance(error, OneLineError) and not error.passes:
                self.left_out = str(error)
                self.say_left_out()
            else:
                log.warning("models are not loaded", exc_info=True)
                self._say(typed_first_line(error), again=True)
        if not self.loaded and not self.left_out:
            gc.collect()  # what was loaded of a model before it failed
            time.sleep(self._pause * random.uniform(0.5, 1.0))
            self._pause = min(2 * self._pause, LONGEST_LOAD_PAUSE)

    def load_or_leave(self) -> None:
        """Try until they are loaded, or this actor is left out."""
        while not self.loaded and not self.left_out:
            self.load()

    def say_left_out(self) -> None:
        """To be said before each question of an actor that is left out: a monitor whose process died knows nothing of
        it."""
        if self.left_out:
            self._say(self.left_out, again=False)

    def _say(self, error: str, *, again: bool) -> None:
        there = {"where": this_place(), "scores": self._scores}
        ask(self._monitor, "not_loaded", self._actor, error, again=again, **there)


def this_place() -> str:
    """Where this actor is, for people."""
    import ray

    return f"{os.uname().nodename} (node {ray.get_runtime_context().get_node_id()[:8]})"
