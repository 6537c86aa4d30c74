"""Where real pictures and their references are: what a user says, without reading anything."""

from dataclasses import dataclass

from pcm.credentials import refuse_credentials

EMBEDDED_PREFIX = "embedded:"


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Where pictures and references are; what --images, --references and --split say.

    `images`: a folder of picture files (image id = file name), a Parquet file or folder of them (columns image_id and
    image), or `embedded:val` / `embedded:test`. `references`: any file that pcm.text.references reads; None where
    `images` is a single Parquet file with a `references` column. Paths or URIs; raises InputError for one that carries
    a credential.
    """

    images: str
    references: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        refuse_credentials(self.images)  # both are recorded before they are opened
        refuse_credentials(self.references or "")


@dataclass(frozen=True, kw_only=True)
class FeatureSource(PictureSource):
    """CLIP features in place of pictures; what --features, --references and --split say.

    `images`: a folder of IMAGE_ID.npz files as published, or one of our datasets, whose captions are the references
    where none are given.
    """
