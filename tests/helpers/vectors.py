"""Vectors to compare by their cosines."""

import numpy as np


def unit(matrix: np.ndarray) -> np.ndarray:
    """The rows at length 1, float32."""
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
