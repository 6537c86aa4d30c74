"""Which releases of the libraries this checkout works with.

pip applies the ranges of pyproject.toml when it installs, and not when `ray job submit --working-dir .` brings newer
code to an older image. So jobs, and the processes that they start on other nodes, look here first.
"""

import functools
import os
import re
from collections.abc import Mapping
from importlib.metadata import distributions

import pcm
from pcm.errors import InputError

#: As in pyproject.toml, which is not installed with the packages; a test holds the two equal.
NEEDED: Mapping[str, str] = {
    "ray": ">=2.60,<2.61",
    "torch": ">=2.13,<2.14",
    "torchvision": ">=0.28,<0.29",
    "diffusers": ">=0.42",
    "transformers": ">=5.23",
    "accelerate": ">=1.15",
    "peft": ">=0.21",
    "sentencepiece": ">=0.2.3",
    "open_clip_torch": ">=3.3",
    "safetensors": ">=0.8",
    "pyarrow": ">=26",
    "pillow": ">=12",
    "numpy": ">=2",
    "huggingface_hub": ">=2.4",
    "tokenizers": ">=0.23",
    "fsspec": ">=2026.9,<2026.10",
    "s3fs": ">=2026.9,<2026.10",
    "tensorboard": ">=2.21",
    "tqdm": ">=4.67",
}


@functools.cache
def check_releases() -> None:
    """Raises InputError for libraries of this machine that are missing, or of a release that is not NEEDED. Imports
    none of them, and looks once a process."""
    wrong = []
    for name, needed in NEEDED.items():
        # pip may leave folders of other releases behind, or one without a release.
        found = sorted({str(each.version) for each in distributions(name=name) if each.version})
        if not any(_is_within(release, needed) for release in found):
            wrong.append(f"{name} {needed} ({'installed: ' + ', '.join(found) if found else 'not installed'})")
    if wrong:
        raise InputError(
            f"libraries on {os.uname().nodename}: pcmnet-ray {pcm.__version__} needs {', '.join(wrong)}; build the "
            "image of this checkout anew (deploy/Dockerfile), or install it with make install"
        )


def _is_within(release: str, needed: str) -> bool:
    """Of a release's numbers alone: 2.13.0a0+vendor counts as 2.13.0."""
    bounds = [(each[:2] == ">=", _numbers(each.lstrip(">=<"))) for each in needed.split(",")]
    return all((_numbers(release) >= bound) is is_least for is_least, bound in bounds)


def _numbers(release: str) -> tuple[int, ...]:
    """2.13 of "2.13rc1"."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", release, maxsplit=1)[0]))
