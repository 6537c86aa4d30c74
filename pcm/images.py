"""Pictures as bytes and pixels: safe decoding and deterministic encoding."""

import io
import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pcm.errors import InputError

#: Larger pictures are refused unread: a decompression bomb must not take a worker's memory (64 megapixels).
MAX_PIXELS = 64_000_000

#: A picture that is longer than so many times its width becomes too large when its shorter side is scaled up.
MAX_ASPECT_RATIO = 100

#: What is written.
IMAGE_FORMATS = ("jpeg", "png", "webp")
#: What is read, by Pillow's names.
OPENED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: File names that are taken for pictures. HEIC is not read: such a file is found, and counted as unreadable.
PICTURE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic",
)  # fmt: skip
#: So many bytes of a file tell its format.
FORMAT_BYTES = 12
_ENDINGS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def image_format_of(data: bytes) -> str | None:
    """Which of IMAGE_FORMATS a file is by its first FORMAT_BYTES bytes, None for any other; its name plays no part."""
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:FORMAT_BYTES] == b"WEBP" else None


def image_ending(data: bytes) -> str:
    """ "jpg", "png" or "webp", by the first bytes of a picture that is one of IMAGE_FORMATS. Raises InputError."""
    found = image_format_of(data)
    if found is None:
        raise InputError(f"a picture that begins with {data[:4]!r}: not a JPEG, PNG or WebP file")
    return _ENDINGS[found]


def open_image(source: str | os.PathLike[str] | bytes | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Decode a picture wholly, as a person sees it, as RGB: upright (EXIF), greys of any depth scaled, on white ground.

    Only OPENED_FORMATS are tried, so no other parser of Pillow's ever sees the bytes. Raises InputError (one line,
    naming the file) when it is missing, corrupt, truncated, over MAX_PIXELS or more than MAX_ASPECT_RATIO times as long
    as it is wide (or the reverse): a CLIP makes the shorter side as long as its own, and the longer one follows.
    """
    label = name or (str(source) if not isinstance(source, bytes) else f"{len(source)} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(opened, formats=OPENED_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{label}: {width}x{height} pixels; at most {MAX_PIXELS:,} are read; resize the picture first"
                    )
                if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                    raise InputError(
                        f"{label}: {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times "
                        "the other; crop the picture first"
                    )
                image.load()
                return _on_white(_in_8_bits(_upright(image)))
    except FileNotFoundError:
        raise InputError(f"{label}: no such file; give the path of a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{label}: over {MAX_PIXELS:,} pixels; resize the picture first") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what a decoder raises depends on what is damaged: struct.error, TypeError, ...
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded ({error})"
        raise InputError(f"{label}: {reason}; give a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file") from None


_T = Image.Transpose
#: What an EXIF orientation asks for; 1 is upright.
_TURNS = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says. Pillow's own exif_transpose writes the EXIF anew, which fails where a field has an odd
    type, as some cameras write it."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that cannot be read says nothing
        return image
    return image if turn is None else image.transpose(turn)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, 32 bits or floats as 8 bits; Pillow's own conversion cuts them off at 255, which is white.

    Integers are taken as 16 bits; floats as 0..1 where none is larger, else as 0..255, else as 0..65535. Raises
    ValueError for a value that is not finite.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a pixel that is not a number")
    top = 65_535.0
    if image.mode == "F":
        top = next((limit for limit in (1.0, 255.0) if values.max() <= limit), top)
    return Image.fromarray(to_uint8(values / top), mode="L")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white, as a page would."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")


def encode_image(pixels: np.ndarray, *, image_format: str, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 pixels; the same pixels give the same bytes with the pinned Pillow.

    JPEG is written without chroma subsampling so that small pictures keep their colours.
    """
    image = Image.fromarray(pixels, mode="RGB")
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif image_format == "png":
        image.save(buffer, "PNG")
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=4)
    else:
        raise InputError(f"image format {image_format!r}: allowed are {', '.join(IMAGE_FORMATS)}")
    return buffer.getvalue()


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Float pixels in 0..1 to uint8, rounded half to even (as diffusers' numpy_to_pil does)."""
    return (np.clip(pixels, 0.0, 1.0) * 255).round().astype(np.uint8)
