"""Where the pictures and features of published data lie."""

from typing import Any

import numpy as np

from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.official.files import features_from_npz, read_annotation
from pcm.records import FeatureShape

SPLIT_FIELD = "{split_id}"
#: In this order a picture is looked for; published ones are JPEG.
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
#: So many annotations are tried before a folder counts as the wrong one.
PROBED = 100


class PublishedFolders:
    """Folders, as paths or URIs; in both, `{split_id}` stands for each picture's own. `features` may be None."""

    def __init__(self, *, images: str, features: str | None) -> None:
        self.images = images
        self.features = features
        self._stores: dict[tuple[str, int], Store] = {}

    def read_image(self, image_id: str, split_id: int) -> bytes:
        """Raises FileNotFoundError."""
        folder = self._store(self.images, split_id)
        for ending in PICTURE_ENDINGS:
            try:
                return folder.read_bytes(f"{image_id}{ending}")
            except FileNotFoundError:
                continue
        raise FileNotFoundError(f"{folder.root}/{image_id}{PICTURE_ENDINGS[0]}")

    def read_features(self, image_id: str, split_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D_v) and (D,). Raises FileNotFoundError, or InputError for a file that holds none."""
        assert self.features is not None
        return features_from_npz(self._store(self.features, split_id).read_bytes(f"{image_id}.npz"))

    def probe(self, annotations: list[Any]) -> FeatureShape | None:
        """The shape of the first features found. Raises InputError when no picture, or no feature, is to be found."""
        readable = []
        for value in annotations[:PROBED]:
            try:
                annotation = read_annotation(value)
            except InputError:
                continue
            readable.append((annotation.image_id, -1 if annotation.split_id is None else annotation.split_id))
        self._first("images", self.images, self.read_image, readable)
        if self.features is None:
            return None
        patches, image = self._first("features", self.features, self.read_features, readable)
        return FeatureShape(embed_dim=len(image), patch_dim=patches.shape[1], num_patches=patches.shape[0])

    def _first(self, what: str, place: str, read: Any, readable: list[tuple[str, int]]) -> Any:
        why = "no annotation there is readable"
        for image_id, split_id in readable:
            try:
                return read(image_id, split_id)
            except (FileNotFoundError, InputError) as error:
                why = f"no {error}" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(
            f"--{what} {place}: nothing for any of the first {PROBED} annotations ({why}); "
            f"give the folder, with {SPLIT_FIELD} where a picture's split goes"
        )

    def _store(self, template: str, split_id: int) -> Store:
        key = template, split_id
        if key not in self._stores:
            if SPLIT_FIELD in template and split_id < 0:
                raise FileNotFoundError(f"{template}: the annotation has no split_id")
            self._stores[key] = open_store(template.replace(SPLIT_FIELD, str(split_id)))
        return self._stores[key]
