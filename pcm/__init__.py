"""PCM-Net: training image captioners on synthetic images. Pure PyTorch, open_clip and diffusers; usable without Ray.

The public names are loaded on first use, so that `import pcm` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "PCMNet": "pcm.captioners.pcmnet.model",
    "PCMNetConfig": "pcm.captioners.pcmnet.config",
    "CLIPWeightedCrossEntropy": "pcm.captioners.pcmnet.loss",
    "beam_search": "pcm.captioners.pcmnet.decoding",
    "greedy_search": "pcm.captioners.pcmnet.decoding",
    "ClipEncoder": "pcm.clip.encoder",
    "Captioner": "pcm.captioners.captioner",
    "Vocabulary": "pcm.text.vocabulary",
    "ConceptVocabulary": "pcm.text.concepts",
    "InputError": "pcm.errors",
    "StoreFailure": "pcm.errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pcm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
