"""Actors of CLIP of which all but one cannot load it."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.generation.pools import CALLS
from cluster.generation.stages.scorer import Scorer
from pcm.errors import InputError


def loaded_by_the_first_alone(folder: Path, *, others: int) -> type[Scorer]:
    """The first actor that starts gets nothing before each of so many others has been given all that it can hold."""

    class ScorerIfFirst(Scorer):
        def __init__(self, *arguments: Any) -> None:
            self._can_load = True
            try:
                (folder / "claim").touch(exist_ok=False)
            except FileExistsError:
                self._can_load = False
            super().__init__(*arguments)
            while self._can_load and len(list(folder.glob("held-*"))) < CALLS * others:
                time.sleep(0.05)

        def __call__(self, block: pa.Table) -> pa.Table:
            (folder / f"held-{block['turn'][0].as_py()}").touch()
            return super().__call__(block)

        def _load(self) -> None:
            if not self._can_load:
                raise InputError("CLIP is not on this machine")
            super()._load()

    return ScorerIfFirst
