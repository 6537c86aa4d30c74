"""Concepts that a user brings in place of a corpus's own nouns, such as the 446 of the published configurations."""

import logging

from cluster.store.store import read_uri
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary

log = logging.getLogger(__name__)


def read_concepts(uri: str) -> ConceptVocabulary:
    """Published concepts, a pickle of (names, tensor), or ours in safetensors, at a path or URI. Raises InputError."""
    from pcm.official.files import concepts_from_pickle  # brings torch, and most runs bring no concepts

    data = read_uri(uri)
    try:
        return ConceptVocabulary.from_bytes(data) if uri.endswith(".safetensors") else concepts_from_pickle(data)
    except InputError as error:
        raise InputError(f"--concepts {uri}: {error}") from None


def fitting_concepts(uri: str, *, embed_dim: int) -> ConceptVocabulary:
    """The same, for a CLIP whose joint space has `embed_dim` dimensions. Raises InputError for those of another."""
    concepts = read_concepts(uri)
    if concepts.embeddings.shape[1] != embed_dim:
        raise InputError(
            f"--concepts {uri}: embeddings of {concepts.embeddings.shape[1]} dimensions, the CLIP's have {embed_dim}; "
            "give the concepts of the same CLIP"
        )
    log.info("--concepts %s: %d concepts", uri, len(concepts))
    return concepts
