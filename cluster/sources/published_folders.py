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
#: Folders that are looked into, from 0, for a picture that is not in the one its annotation names.
MOST_SPLITS = 64


class PublishedFolders:
    """Folders, as paths or URIs; in both, `{split_id}` stands for the number of a picture's folder. `features` may be
    None.

    A picture is found by its id, in whichever folder it lies: the one that its annotation names is only tried first.
    SynC's refined annotations give a picture another caption's split_id.
    """

    def __init__(self, *, images: str, features: str | None) -> None:
        self.images = images
        self.features = features
        self._stores: dict[tuple[str, int], Store] = {}
        self._folders: dict[str, list[int]] = {}

    def read_image(self, image_id: str, split_id: int) -> tuple[bytes, str]:
        """The bytes, and where they lie: "sp3/6000123.jpg", without `{split_id}` "6000123.jpg". FileNotFoundError."""
        return self._find(self.images, split_id, [f"{image_id}{ending}" for ending in PICTURE_ENDINGS])

    def read_features(self, image_id: str, split_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D_v) and (D,). Raises FileNotFoundError, or InputError for a file that holds none."""
        assert self.features is not None
        return features_from_npz(self._find(self.features, split_id, [f"{image_id}.npz"])[0])

    def _find(self, template: str, split_id: int, names: list[str]) -> tuple[bytes, str]:
        for split in self._splits(template, split_id):
            folder = self._store(template, split)
            for name in names:
                try:
                    data = folder.read_bytes(name)
                except FileNotFoundError:
                    continue
                return data, name if SPLIT_FIELD not in template else f"sp{split}/{name}"
        raise FileNotFoundError(f"{template}/{names[0]}")

    def _splits(self, template: str, first: int) -> list[int]:
        """The folders to look into; what the template names alone has none."""
        if SPLIT_FIELD not in template:
            return [-1]
        if template not in self._folders:
            found = [split for split in range(MOST_SPLITS) if self._store(template, split).exists("")]
            self._folders[template] = found
        known = self._folders[template]
        return [*([first] if first >= 0 else []), *(split for split in known if split != first)]

    def probe(self, annotations: list[Any], *, score_scale: float) -> FeatureShape | None:
        """The shape of the first features found. Raises InputError when no picture, or no feature, is to be found."""
        readable = []
        for value in annotations[:PROBED]:
            try:
                annotation = read_annotation(value, score_scale=score_scale)
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
            self._stores[key] = open_store(template.replace(SPLIT_FIELD, str(split_id)))
        return self._stores[key]
