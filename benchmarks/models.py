"""Which models work, as a table of docs/models.md: python -m benchmarks.models --clip [ARCHITECTURE ...]

Every open_clip architecture is shrunk to two layers with random weights and compared with open_clip's own model and
preprocessing; the sizes in the table are those of the full one. Two seconds of one core each, 144 in all. The page is
written after each row, and rows that it has already are not made again, so the command can be stopped at any time.

`--t2i FOLDER ...` draws with the tiny pipelines in these folders, and with those of tests/helpers/tiny_pipelines.py.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip

from benchmarks.picture_models import HEADER as T2I_HEADER
from benchmarks.picture_models import picture_rows
from benchmarks.shrunk_clips import shrunk
from pcm.clip.encoder import ClipEncoder
from pcm.clip.towers import feature_shape, token_grid

CLIP_HEADER = (
    "| architecture | pretrained tags | global | patches | head to the joint space | bytes a row | "
    "same features | same pixels |",
    "|---|---|---|---|---|---|---|---|",
)
TEXT = "a cat on the beach"
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
#: Between these lines of the page stands the table; the rest of the page is written by hand or by other commands.
CLIP_MARKS = ("<!-- clip: begin -->", "<!-- clip: end -->")
T2I_MARKS = ("<!-- t2i: begin -->", "<!-- t2i: end -->")


def clip_rows(architectures: list[str]) -> Iterator[str]:
    """A line of the table for each. Raises what the model raises."""
    for architecture in architectures:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        with tempfile.TemporaryDirectory() as folder, shrunk(architecture, Path(folder)) as weights:
            features, pixels = _same_as_open_clip(architecture, tags[0] if tags else str(weights))
        config = open_clip.get_model_config(architecture)
        with torch.device("meta"):
            visual = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
        grid = token_grid(visual)
        shape = feature_shape(config["embed_dim"], grid)
        patches = f"{shape.num_patches} x {shape.patch_dim}" if shape.has_patches else "-"
        head = "yes" if grid and grid.has_head else "-"
        yield (
            f"| {architecture} | {', '.join(tags) or '-'} | {shape.embed_dim} | {patches} | {head} | "
            f"{shape.bytes_per_row:,} | {_yes(features)} | {_yes(pixels)} |"
        )


def _same_as_open_clip(architecture: str, pretrained: str) -> tuple[bool, bool]:
    """Whether features (within 2e-6) and preprocessed pixels (bit for bit) are those of open_clip."""
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    model, _, preprocess = open_clip.create_model_and_transforms(
        architecture, pretrained=pretrained, force_quick_gelu=tag.get("quick_gelu", False)
    )
    tokenizer = open_clip.get_tokenizer(architecture)
    encoder = ClipEncoder(f"{architecture}/{pretrained}", batch_size=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    pixel_values = preprocess(image)[None]  # (1, 3, H, W)
    with torch.no_grad():
        ours = encoder.encode_images([image]).global_feature, encoder.encode_texts([TEXT])
        theirs = (
            model.eval().encode_image(pixel_values, normalize=True).numpy(),
            model.encode_text(tokenizer([TEXT]), normalize=True).numpy(),
        )
    same = all(np.abs(one - two).max() <= 2e-6 for one, two in zip(ours, theirs, strict=True))
    return same, torch.equal(encoder._pixels(image)[None], pixel_values)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def rows_of(page: str, marks: tuple[str, str] = CLIP_MARKS) -> dict[str, str]:
    """Architecture, or family -> its row in the page."""
    begin, end = (page.find(mark) for mark in marks)
    lines = page[begin:end].splitlines() if 0 <= begin < end else []
    rows = [line for line in lines if line.startswith("| ") and line not in CLIP_HEADER + T2I_HEADER]
    return {line.split("|")[1].strip(): line for line in rows}


def with_rows(
    page: str, rows: dict[str, str], marks: tuple[str, str] = CLIP_MARKS, header: tuple[str, ...] = CLIP_HEADER
) -> str:
    """The page with these rows, by name, in place of those that it had. Raises ValueError without marks."""
    begin, end = (page.index(mark) for mark in marks)
    lines = [rows[name] for name in sorted(rows, key=str.lower)]
    table = "\n".join(("", *header, *lines, ""))
    return page[: begin + len(marks[0])] + "\n" + table.lstrip("\n") + page[end:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--clip", nargs="*", metavar="ARCHITECTURE", help="without a name: all")
    parser.add_argument("--t2i", nargs="*", metavar="FOLDER", type=Path, help="pipelines beside the tests' own")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="page to write, with the marks of the table: %(default)s"
    )
    parser.add_argument("--again", action="store_true", help="also make the rows that the page has already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if args.t2i is not None:
        with tempfile.TemporaryDirectory() as folder:
            _write_picture_rows(args.page, [*_tests_own(Path(folder)), *args.t2i])
    if args.clip is None:
        return
    wanted = args.clip or open_clip.list_models()
    present = set() if args.again else set(rows_of(args.page.read_text(encoding="utf-8")))
    for architecture in [name for name in wanted if name not in present]:
        for line in clip_rows([architecture]):
            print(line, flush=True)
            page = args.page.read_text(encoding="utf-8")
            args.page.write_text(with_rows(page, {**rows_of(page), architecture: line}), encoding="utf-8")


def _tests_own(folder: Path) -> list[Path]:
    from tests.helpers.tiny_pipelines import FAMILIES, save_pipeline

    return [save_pipeline(family, folder / family) for family in FAMILIES]


def _write_picture_rows(place: Path, folders: list[Path]) -> None:
    """A family that two of the folders have is drawn with the first."""
    unique = list({folder.name: folder for folder in reversed(folders)}.values())
    for family, line in picture_rows(unique):
        print(line, flush=True)
        page = place.read_text(encoding="utf-8")
        rows = {**rows_of(page, T2I_MARKS), family: line}
        place.write_text(with_rows(page, rows, T2I_MARKS, T2I_HEADER), encoding="utf-8")


if __name__ == "__main__":
    main()
