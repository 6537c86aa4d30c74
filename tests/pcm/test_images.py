"""Pictures as bytes: decoded safely, encoded the same every time, and refused when they show nothing."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from pcm.errors import InputError
from pcm.images import (
    FORMAT_BYTES,
    IMAGE_FORMATS,
    MAX_PIXELS,
    OPENED_FORMATS,
    encode_image,
    image_ending,
    image_format_of,
    open_image,
    to_uint8,
)
from tests.helpers.paths import DATA
from tests.helpers.png_header import png_header


def picture(side: int = 32, seed: int = 0) -> np.ndarray:
    """(side, side, 3) uint8: a smooth gradient with some noise."""
    ramp = np.linspace(20, 230, side)
    pixels = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], 128 + 0 * np.add.outer(ramp, ramp)], -1)
    return (pixels + np.random.default_rng(seed).normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_an_encoded_picture_decodes_to_what_it_was(image_format: str) -> None:
    decoded = np.asarray(open_image(encode_image(picture(), image_format=image_format, quality=95)))
    assert decoded.shape == (32, 32, 3)
    error = np.abs(decoded.astype(int) - picture()).mean()
    assert error == 0 if image_format == "png" else error < 4


@pytest.mark.parametrize(("name", "ending"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_a_file_is_known_by_its_first_bytes(name: str, ending: str) -> None:
    head = encode_image(picture(), image_format=name, quality=80)[:FORMAT_BYTES]
    assert (image_format_of(head), image_ending(head)) == (name, ending)


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe", b"RIFF\0\0\0\0WAVE", b"GIF89a", b"\x89PNG"])
def test_a_file_of_another_kind_is_none_of_ours(data: bytes) -> None:
    assert image_format_of(data) is None
    with pytest.raises(InputError, match="not a JPEG, PNG or WebP file"):
        image_ending(data)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_the_same_pixels_give_the_same_bytes(image_format: str) -> None:
    first, second = (encode_image(picture(), image_format=image_format, quality=80) for _ in range(2))
    assert first == second
    assert first != encode_image(picture(seed=1), image_format=image_format, quality=80)


def test_jpeg_keeps_the_colour_of_single_pixels() -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = 255  # red beside blue, pixel by pixel
    stripes[:, 1::2, 2] = 255
    decoded = np.asarray(open_image(encode_image(stripes, image_format="jpeg", quality=95))).astype(int)
    assert np.abs(decoded - stripes).mean() < 12  # 64 with chroma at half the resolution


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    pixels = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 3)).astype(np.float32)
    theirs = np.stack([np.asarray(image) for image in VaeImageProcessor.numpy_to_pil(pixels)])
    assert (np.stack([to_uint8(image) for image in pixels]) == theirs).all()
    assert to_uint8(np.array([[[-0.2, 1.7, 0.5]]])).tolist() == [[[0, 255, 128]]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(picture()).convert("L")
    image = Image.fromarray(picture()).convert(mode) if mode != "I;16" else grey.convert("I").convert("I;16")
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    assert open_image(path).mode == "RGB"


def refused(source: str | Path | bytes, **arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        open_image(source, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_picture_that_is_no_picture_is_refused_by_its_name(tmp_path: Path) -> None:
    whole = encode_image(picture(), image_format="jpeg", quality=95)
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "half.jpg: cannot be decoded" in refused(tmp_path / "half.jpg")
    assert "text.jpg: not a picture" in refused(tmp_path / "text.jpg")
    assert "empty.jpg: not a picture" in refused(str(tmp_path / "empty.jpg"))
    assert "none.jpg: no such file" in refused(tmp_path / "none.jpg")
    assert refused(whole[:50], name="row 7").startswith("row 7: ")
    damaged = io.BytesIO(encode_image(picture(), image_format="png", quality=0)).getvalue()
    assert "cannot be decoded" in refused(damaged[:60] + b"\0\0\0\0" + damaged[64:])


def test_a_decompression_bomb_is_refused_before_it_is_read() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    assert "pixels" in refused(png_header(side, side))
    assert "pixels" in refused(png_header(60_000, 60_000))


# --- pictures as people have them ---

CASES = DATA / "cases" / "images"


def test_a_picture_is_turned_upright_as_its_camera_says() -> None:
    stored = np.asarray(Image.open(CASES / "exif_orientation3.jpg"))
    np.testing.assert_array_equal(np.asarray(open_image(CASES / "exif_orientation3.jpg")), stored[::-1, ::-1])


def exif(*fields: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value of up to 4 bytes), which Pillow itself would not write."""
    entries = b"".join(struct.pack("<HHI", *field[:3]) + field[3].ljust(4, b"\0") for field in fields)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    buffer = io.BytesIO()
    block = exif((0x0112, 3, 1, struct.pack("<H", orientation)))
    Image.fromarray(picture()[:20], "RGB").save(buffer, "JPEG", exif=block)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(np.asarray(open_image(buffer.getvalue())), np.asarray(turned))


@pytest.mark.parametrize(
    "odd", [(0x0128, 2, 2, b"2\0"), (0x011A, 2, 3, b"72\0")], ids=["a unit as text", "a resolution as text"]
)
def test_a_field_of_an_odd_type_beside_the_orientation_is_no_hindrance(odd: tuple[int, int, int, bytes]) -> None:
    buffer = io.BytesIO()
    block = exif((0x0112, 3, 1, struct.pack("<H", 6)), odd)
    Image.fromarray(picture()[:20], "RGB").save(buffer, "JPEG", exif=block)
    stored = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(np.asarray(open_image(buffer.getvalue())), np.rot90(stored, -1))


@pytest.mark.parametrize("image_format", ["AVIF", "TIFF", "GIF", "PNG", "WEBP", "BMP", "JPEG"])
def test_a_picture_with_damage_anywhere_is_read_or_refused(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(), "RGB").save(buffer, image_format)
    whole = buffer.getvalue()
    chosen = np.random.default_rng(0)
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[place] = chosen.integers(256)
        for data in (bytes(damaged), whole[:place]):
            try:
                assert open_image(data).mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)


def test_greys_of_16_bits_are_scaled() -> None:
    stored = np.asarray(Image.open(CASES / "gray16.png"), np.float64)
    seen = np.asarray(open_image(CASES / "gray16.png"))
    assert np.abs(seen[..., 0] - stored / 257).max() <= 0.5 and (seen[..., 0] == seen[..., 2]).all()


@pytest.mark.parametrize(("top", "scale"), [(1.0, 255.0), (255.0, 1.0), (65_535.0, 255.0 / 65_535.0)])
def test_greys_of_floats_are_scaled_by_their_range(top: float, scale: float) -> None:
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(values, mode="F").save(buffer, "TIFF")
    seen = np.asarray(open_image(buffer.getvalue()))[..., 0]
    assert np.abs(seen - values * scale).max() <= 0.5
    values[0, 0] = np.nan
    buffer = io.BytesIO()
    Image.fromarray(values, mode="F").save(buffer, "TIFF")
    with pytest.raises(InputError, match="a pixel that is not a number"):
        open_image(buffer.getvalue())


@pytest.mark.parametrize("name", ["icon_rgba.png", "icon_palette.png"])
def test_what_is_transparent_shows_white(name: str) -> None:
    alpha = np.asarray(Image.open(CASES / name).convert("RGBA"))[..., 3]
    seen = np.asarray(open_image(CASES / name))
    assert (seen[alpha == 0] == 255).all() and (seen[alpha == 255] == 0).all() and 0 < (alpha == 255).mean() < 1


@pytest.mark.parametrize("name", ["sliver_1x65000.png", "spacer_1x4000.png"])
def test_a_sliver_is_refused_by_its_header(name: str) -> None:
    with pytest.raises(InputError, match="one side may be at most 100 times the other"):
        open_image(CASES / name)


@pytest.mark.parametrize("name", ["chrome.jfif", "upright.jpe"])
def test_jpeg_under_other_endings_is_read(name: str) -> None:
    assert open_image(CASES / name).size == (320, 240)


def test_postscript_reaches_no_interpreter() -> None:
    with pytest.raises(InputError, match="not a picture"):
        open_image(CASES / "eps_named.jpg")
    assert "EPS" not in OPENED_FORMATS
