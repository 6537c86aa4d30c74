"""Which state a dataset is in: the digest by which a run, a view or an export knows its data again."""

import hashlib

from pcm.documents import document_bytes, read_document

#: Fields of dataset.json that say by what the rows were made.
_MADE_BY = ("versions", "environments")


def state_digest(document: bytes) -> str:
    """sha256 of a dataset's dataset.json or plan.json. Of a derived dataset without the releases and machines that made
    it: the same rows, made again elsewhere, are the same data. Bytes that differ show in the checksums of its shards,
    which stay. Where a dataset was drawn is a part of it."""
    try:
        values = read_document(document)
    except ValueError:  # damaged: whoever reads it says so
        values = None
    if isinstance(values, dict) and values.get("lineage") and any(name in values for name in _MADE_BY):
        document = document_bytes({name: value for name, value in values.items() if name not in _MADE_BY})
    return hashlib.sha256(document).hexdigest()
