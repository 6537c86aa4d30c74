"""Make `import torchvision` work where its compiled operators do not load (a CPU-only torch beside a CUDA torchvision).

open_clip, diffusers and transformers all import torchvision; it fails with "operator torchvision::nms does not exist"
when its C++ library is missing, although none of them calls that operator here. Declaring the two schemas is enough.
Import this module before any of the three, in the driver and in every worker.
"""

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import torch

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_operators_load() -> bool:
    """Whether torchvision's own library registers its operators in this process (without importing torchvision)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend: the import error will name the missing package
    folder = Path(spec.origin).parent
    libraries = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    library = next((path for path in libraries if path.exists()), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(os.fspath(library))
    except OSError:
        return False
    return True


def _declare() -> torch.library.Library | None:
    if _compiled_operators_load():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _MISSING_SCHEMAS:
        library.define(schema)
    return library


_LIBRARY = _declare()  # kept alive: the schemas go when the library object does
