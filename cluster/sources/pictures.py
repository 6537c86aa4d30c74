"""Real pictures with their reference captions: what a captioner is validated and evaluated on."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.sources.picture_source import EMBEDDED_PREFIX, PictureSource
from cluster.store.store import Store, local_copy, open_store, read_uri
from pcm import embedded
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.errors import InputError, first_line
from pcm.images import PICTURE_ENDINGS, open_image
from pcm.text.references import CocoPicture, References, load_coco_pictures, load_references

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that have references. `open(i)` decodes one, raising InputError when it cannot be."""

    image_ids: tuple[str, ...]
    references: dict[str, list[str]]
    open: Callable[[int], Image.Image]
    without_references: int  # pictures left out
    without_picture: int  # pictures that have references and are not there
    bad_references: int  # references left out

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class PictureFiles:
    """Pictures as they lie at a place: their names, and `read(i)`, the bytes of one as they are, decoded or not.

    `read` raises FileNotFoundError for one that is not there any more, such as a link that leads nowhere.
    """

    place: str
    names: Sequence[str]
    read: Callable[[int], bytes]

    def match(self, image_ids: Container[str]) -> dict[str, int]:
        """Image id -> position of its picture. Raises InputError when two pictures have one image id."""
        matched: dict[str, int] = {}
        for position, name in enumerate(self.names):
            key = next((candidate for candidate in candidate_ids(name) if candidate in image_ids), None)
            if key in matched:
                found = f"{self.names[matched[key]]}, {name}"
                raise InputError(f"{self.place}: two pictures for image id {key!r} ({found}); keep one")
            if key is not None:
                matched[key] = position
        return matched


def load_picture_set(source: PictureSource, *, limit: int | None = None) -> PictureSet:
    """The pictures that have references, sorted by image id; the first `limit` of them.

    Raises InputError when there are no pictures, no references, or no picture has references.
    """
    pictures = find_pictures(source.images)
    named = pictures.names
    found = picture_references(source)
    references = found.by_image
    matched = pictures.match(references)
    if not matched:
        raise InputError(
            f"{pictures.place}: none of its {len(named)} pictures (such as {named[0]!r}) is among the "
            f"{len(references)} image ids of the references (such as {next(iter(references))!r}); "
            "check --references and --split"
        )

    def open_picture(i: int) -> Image.Image:
        position = matched[image_ids[i]]
        try:
            return open_image(pictures.read(position), name=named[position])
        except (FileNotFoundError, IsADirectoryError) as error:
            raise InputError(f"{named[position]}: cannot be read ({type(error).__name__})") from None

    unmatched = len(named) - len(matched)
    image_ids = tuple(sorted(matched))[:limit]
    missing = len(references) - len(matched)
    if unmatched or missing:
        log.info("%d pictures without references and %d references without a picture left out", unmatched, missing)
    return PictureSet(
        image_ids=image_ids,
        references={image_id: references[image_id] for image_id in image_ids},
        open=open_picture,
        without_references=unmatched,
        without_picture=missing,
        bad_references=found.left_out.total(),
    )


def picture_references(source: PictureSource) -> References:
    """Reference captions by image id. Raises InputError as pcm.text.references.load_references does."""
    with _reference_file(source) as path:
        return load_references(path, split=source.split)


def coco_pictures(source: PictureSource) -> dict[str, CocoPicture]:
    """Image id -> number and domain, where the references are a file of COCO's form, as NoCaps' is."""
    with _reference_file(source) as path:
        return load_coco_pictures(path)


def check_source(source: PictureSource) -> None:
    """Raises InputError where no picture is at the place, or the references cannot be read; no picture is opened."""
    uri = resolved(source.images)
    if not open_store(uri).list() and not open_store(uri).exists(""):
        raise InputError(f"{uri}: no pictures; there is nothing at this place")
    picture_references(source)


def source_anywhere(source: PictureSource) -> PictureSource:
    """The same source in paths and URIs that mean the same in a worker, whose working folder is another."""

    def address(uri: str) -> str:
        return uri if uri.startswith(EMBEDDED_PREFIX) else open_store(uri).address

    return replace(
        source,
        images=address(source.images),
        references=None if source.references is None else address(source.references),
    )


def references_sha256(source: PictureSource) -> str | None:
    """Of the file of references; None where there is none beside the pictures."""
    return None if source.references is None else hashlib.sha256(read_uri(resolved(source.references))).hexdigest()


@dataclass(frozen=True)
class EncodedPictures:
    """CLIP features of some pictures, and the lines of those that could not be read."""

    image_ids: tuple[str, ...]
    features: ImageFeatures
    unreadable: dict[str, str]  # image id -> why


def encode_pictures(
    pictures: PictureSet, encoder: ClipEncoder, *, positions: Sequence[int] | None = None
) -> Iterator[EncodedPictures]:
    """Features of the pictures at `positions` (all by default), an encoder's batch at a time."""
    positions = range(len(pictures)) if positions is None else positions
    for start in range(0, len(positions), encoder.batch_size):
        opened: dict[str, Image.Image] = {}
        unreadable: dict[str, str] = {}
        for position in positions[start : start + encoder.batch_size]:
            image_id = pictures.image_ids[position]
            try:
                opened[image_id] = pictures.open(position)
            except InputError as error:
                log.warning("left out: %s", error)
                unreadable[image_id] = str(error)
        yield EncodedPictures(tuple(opened), encoder.encode_images(list(opened.values())), unreadable)


def candidate_ids(name: str) -> list[str]:
    """The ids under which references may know the picture `name`, the likeliest first.

    "val/COCO_val2014_000000391895.jpg": itself, its file name, both without the ending, and COCO's number 391895.
    """
    path = PurePosixPath(name)
    candidates = [name, path.name, str(path.with_suffix("")) if path.name else name, path.stem]
    if number := re.fullmatch(r"(?:.*_)?([0-9]+)", path.stem):
        candidates.append(number[1].lstrip("0") or "0")
    # File systems differ in how they write accents (macOS: in two characters), and readers strip blanks.
    forms = [candidates, *([unicodedata.normalize(form, each) for each in candidates] for form in ("NFC", "NFD"))]
    return list(dict.fromkeys(text for form in forms for each in form for text in (each, each.strip())))


def reference_names(image_ids: Iterable[str]) -> dict[str, str]:
    """Any name by which a file without a picture's own ending may know an image id -> that id: "1000092795" is
    "1000092795.jpg". An id itself comes before what another's name shortens to.
    """
    image_ids = list(image_ids)
    names = {image_id: image_id for image_id in image_ids}
    for image_id in image_ids:
        for candidate in candidate_ids(image_id):
            names.setdefault(candidate, image_id)
    return names


def _reference_file(source: PictureSource) -> AbstractContextManager[Path]:
    uri = resolved(source.references or source.images)
    if source.references is None and not open_store(uri).is_file():
        raise InputError(
            f"references are missing: {uri} is no single Parquet file with a column of them; give a file of captions "
            "as --references, or --val-references"
        )
    return local_copy(uri)


def resolved(uri: str) -> str:
    """The path that `embedded:val` or `embedded:test` stands for; any other URI unchanged."""
    if not uri.startswith(EMBEDDED_PREFIX):
        return uri
    return str(embedded.test_set_path(uri.removeprefix(EMBEDDED_PREFIX)))


def find_pictures(images: str) -> PictureFiles:
    """The pictures of a `PictureSource.images`. Raises InputError when there are none."""
    uri = resolved(images)
    store = open_store(uri)
    if uri.endswith(".parquet") and store.is_file():
        return PictureFiles(uri, *_parquet_pictures(store, [""]))
    names = picture_keys(store)
    tables = [] if names else [key for key in store.list() if key.endswith(".parquet")]
    if tables:
        return PictureFiles(uri, *_parquet_pictures(store, tables))
    if not names:
        raise InputError(
            f"{uri}: no pictures; give a folder of JPEG, PNG or WebP files (.jpg, .png, .webp), a Parquet file with "
            "columns image_id and image, embedded:val or embedded:test"
        )
    return PictureFiles(uri, names, lambda position: store.read_bytes(names[position]))


def picture_keys(store: Store) -> list[str]:
    """The pictures below a place, in the order of their names."""
    endings = [key for key in store.list() if key.lower().endswith(PICTURE_ENDINGS)]
    names = [key for key in endings if not _is_macos_litter(key)]
    if len(names) < len(endings):
        log.info("%s: %d files left out that macOS keeps beside pictures", store.root, len(endings) - len(names))
    return names


def _is_macos_litter(key: str) -> bool:
    """Whether a file is one that macOS writes beside a picture, under nearly the same name, and that is none."""
    path = PurePosixPath(key)
    return path.name.startswith("._") or "__MACOSX" in path.parts


def _parquet_pictures(store: Store, keys: Sequence[str]) -> tuple[Sequence[str], Callable[[int], bytes]]:
    tables = []
    for key in keys:
        path = store.path(key)
        try:
            with store.open(key, buffered=False) as file:
                tables.append(pq.ParquetFile(file).read(columns=["image_id", "image"]))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None
        if tables[-1].num_columns != 2 or not _holds_bytes(tables[-1].schema.field("image").type):
            found = ", ".join(f"{field.name} {field.type}" for field in tables[-1].schema)
            raise InputError(
                f"{path}: needs columns image_id and image (bytes, or struct of bytes and path); of these it has "
                f"{found or 'none'}"
            )
    names = [str(value) for table in tables for value in table["image_id"].to_pylist()]
    pictures = [picture for table in tables for chunk in table["image"].chunks for picture in chunk]

    def read(position: int) -> bytes:
        picture = pictures[position].as_py()
        return (picture.get("bytes") if isinstance(picture, dict) else picture) or b""

    return names, read


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _holds_bytes(type_.field("bytes").type)
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)
