"""The frozen CLIP: its features are open_clip's own, and a row does not depend on its neighbours."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
import transformers

from pcm.clip.encoder import ClipEncoder
from pcm.clip.names import folder_revision, revision_here, whole_folder_revision
from pcm.clip.truncation import count_tokens, truncation_check
from pcm.clip.weights import tower_facts
from pcm.errors import InputError
from pcm.images import open_image

TEXTS = ["a cat", "a dog on the beach", "Ein Hund.", "a cat", "\N{GRINNING FACE} and friends"]


@pytest.fixture(scope="module")
def encoder(tiny_clip: Path) -> ClipEncoder:
    return ClipEncoder(str(tiny_clip), batch_size=4)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(32, 32), (40, 30), (32, 64), (32, 32), (100, 90)]
    return [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def save_clip(folder: Path, *, image_size: int, patch_size: int, **vision: object) -> Path:
    """An open_clip folder with random weights and a grid of image_size // patch_size."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": image_size, "layers": 1, "width": 32, "head_width": 16, "patch_size": patch_size, **vision
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.model.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_shapes_are_those_of_the_model(encoder: ClipEncoder, images: list[Image.Image]) -> None:
    shape = encoder.features
    assert (shape.embed_dim, shape.patch_dim, shape.num_patches) == (32, 64, 16)
    assert (encoder.resolution, encoder.context_length) == (32, 77)
    encoded = encoder.encode_images(images)
    assert encoded.global_feature.shape == (5, 32) and encoded.patch_features.shape == (5, 16, 64)
    assert encoder.encode_texts(TEXTS).shape == (5, 32)
    assert encoder.encode_images([]).patch_features.shape == (0, 16, 64)
    assert encoder.encode_texts([]).shape == (0, 32)


def test_features_are_those_that_open_clip_computes(
    encoder: ClipEncoder, tiny_clip: Path, images: list[Image.Image]
) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    model.eval()
    tokens: list[torch.Tensor] = []  # what leaves the last block, [CLS] first
    model.visual.transformer.resblocks[-1].register_forward_hook(lambda module, given, out: tokens.append(out))
    with torch.no_grad():
        pixel_values = torch.stack([preprocess(image) for image in images])
        global_feature = model.encode_image(pixel_values, normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny_clip}")(TEXTS), normalize=True)
    encoded = encoder.encode_images(images)
    np.testing.assert_allclose(encoded.global_feature, global_feature.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoded.patch_features, tokens[0][:, 1:].numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts.numpy(), atol=1e-5)

    head = encoder.head()
    cls = torch.nn.functional.layer_norm(tokens[0][:, 0], (64,), head["ln_post.weight"], head["ln_post.bias"])
    again = torch.nn.functional.normalize(cls @ head["proj"], dim=-1)
    np.testing.assert_allclose(again.numpy(), global_feature.numpy(), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(encoder: ClipEncoder, images: list[Image.Image]) -> None:
    together = encoder.encode_images(images)
    texts = encoder.encode_texts(TEXTS)
    for row in range(len(images)):
        alone = encoder.encode_images(images[row : row + 1])
        # One row of a matrix product may be summed in another order than three: equal but for the last bits.
        np.testing.assert_allclose(alone.global_feature[0], together.global_feature[row], atol=1e-6)
        np.testing.assert_allclose(alone.patch_features[0], together.patch_features[row], atol=1e-5)
        np.testing.assert_allclose(encoder.encode_texts(TEXTS[row : row + 1])[0], texts[row], atol=1e-6)
    assert not np.allclose(together.global_feature[0], together.global_feature[3]), "different pictures differ"


def test_small_batches_of_one_thread_give_the_bytes_of_large_ones(tmp_path: Path) -> None:
    """At the real widths of ViT-B/32, whose matrix products are as large as those that datasets are made with."""
    folder = save_clip(tmp_path / "clip", image_size=224, patch_size=32, width=768, head_width=64)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(3)] * 11
    texts = [f"{number} cats" for number in range(3)] * 11
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder = ClipEncoder(str(folder), batch_size=32)
        assert encoder._small_batches() == [4, 8, 16]
        large, large_texts = encoder.encode_images(pictures[:32]), encoder.encode_texts(texts[:32])
        for count in (1, 3, 5, 9, 16, 17):
            small = encoder.encode_images(pictures[:count])
            np.testing.assert_array_equal(small.global_feature, large.global_feature[:count])
            np.testing.assert_array_equal(small.patch_features, large.patch_features[:count])
            np.testing.assert_array_equal(encoder.encode_texts(texts[:count]), large_texts[:count])
        torch.set_num_threads(2)
        assert encoder._small_batches() == []
        assert ClipEncoder(str(folder), exact=False)._small_batches() == [4, 8, 16]
    finally:
        torch.set_num_threads(threads)


def test_rows_have_unit_length(encoder: ClipEncoder, images: list[Image.Image]) -> None:
    for rows in (encoder.encode_images(images).global_feature, encoder.encode_texts(TEXTS)):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("side", "num_patches"), [(7, 49), (8, 64), (9, 81), (10, 25), (16, 64)])
def test_only_large_even_grids_are_pooled(side: int, num_patches: int, tmp_path: Path) -> None:
    encoder = ClipEncoder(str(save_clip(tmp_path / "clip", image_size=4 * side, patch_size=4)), batch_size=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8))
    assert encoder.num_patches == num_patches
    assert encoder.encode_images([image]).patch_features.shape == (1, num_patches, 32)


def test_tokens_are_counted_with_start_and_end_before_truncation(encoder: ClipEncoder, tiny_clip: Path) -> None:
    assert encoder.count_tokens("a cat") == 4
    assert encoder.count_tokens(" ".join(["cat"] * 100)) == 102
    too_long = truncation_check(str(tiny_clip))
    assert not too_long(" ".join(["cat"] * 75)) and too_long(" ".join(["cat"] * 76))
    assert not truncation_check("null")("cat " * 500)
    chinese = "一只棕色的狗在绿色的草地上奔跑旁边有两个孩子在玩"  # 24 characters of up to three tokens
    assert too_long(chinese * 2) and encoder.count_tokens(chinese * 2) > 77 and not too_long(chinese[:8])


def test_tokens_are_counted_of_the_text_that_the_tokenizer_cleans(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "dog": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    as_siglip = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    assert count_tokens(as_siglip, "A dog!!!") == 2


def test_a_text_over_the_context_is_cut_and_still_encoded(encoder: ClipEncoder) -> None:
    long = encoder.encode_texts([" ".join(["cat"] * 100), " ".join(["cat"] * 90)])
    assert np.isfinite(long).all()
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        ClipEncoder(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, tiny_clip: Path) -> None:
    assert "ViT-Z-99" in refused("ViT-Z-99/openai") and "ViT-L-14/openai" in refused("ViT-B-32")
    (tmp_path / "empty").mkdir()
    assert "open_clip_config.json" in refused(str(tmp_path / "empty"))
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights/open_clip_config.json").write_text((tiny_clip / "open_clip_config.json").read_text())
    assert "cannot be loaded" in refused(str(tmp_path / "no_weights"))


def spoil_safetensors(folder: Path) -> None:
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_pickle(content: object) -> Callable[[Path], None]:
    """Weights as torch.save has them, or these bytes."""

    def replace_weights(folder: Path) -> None:
        (folder / "open_clip_model.safetensors").unlink()
        file = folder / "open_clip_pytorch_model.bin"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)

    return replace_weights


def configured(part: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "open_clip_config.json").read_text())
        (config if part in config else config["model_cfg"])[part].update(values)
        (folder / "open_clip_config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_safetensors, "SafetensorError: .*incomplete metadata.*; get its files again if they may be damaged"),
        (as_pickle(b"garbage" * 99), "its file of weights is damaged, or holds more than tensors"),
        (as_pickle({"weights": {}, "options": argparse.Namespace()}), "is damaged, or holds more than tensors"),
        (as_pickle(b""), "its file of weights is damaged"),
        (as_pickle([1, 2]), "AttributeError: 'list' object"),
        (as_pickle({"model": {}}), r"state_dict for CLIP: Missing key\(s\) in state_dict: .positional_embedding"),
        (configured("text_cfg", width="16"), "TypeError: .*got str"),
        (configured("text_cfg", pool_type="other"), "assert pool_type in "),
        (configured("text_cfg", tokenizer_kwargs={"strip_sep_token": True}), "TypeError: .*strip_sep_token"),
        (configured("vision_cfg", patch_size=0), "ZeroDivisionError"),
        (configured("vision_cfg", timm_model_name="vit_tiny_patch16_224", timm_proj="other"), "assert proj in "),
        (configured("preprocess_cfg", interpolation="other"), "assert interpolation in "),
    ],
)  # fmt: skip
def test_what_a_library_says_of_damaged_files_is_one_line(
    tmp_path: Path, tiny_clip: Path, spoil: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    spoil(folder)
    line = refused(str(folder))
    assert re.search(f"cannot be loaded: .*{said}", line) and "weights_only" not in line, line


def test_a_tower_of_a_configuration_that_is_none_is_refused_before_weights_are_there(
    tmp_path: Path, tiny_clip: Path
) -> None:
    for number, spoil in enumerate(
        (
            configured("vision_cfg", patch_size=0),
            configured("vision_cfg", timm_model_name="vit_tiny_patch16_224", timm_proj="other"),
        )
    ):
        folder = Path(shutil.copytree(tiny_clip, tmp_path / f"clip{number}"))
        spoil(folder)
        with pytest.raises(InputError, match="its configuration cannot be used"):
            tower_facts(str(folder))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_what_the_device_says_passes_unchanged(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "create_model", fails)
    with pytest.raises(type(error)) as raised:
        ClipEncoder(str(tiny_clip))
    assert raised.value is error


def test_a_tower_that_pools_by_attention_gives_tokens_without_a_head(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = save_clip(tmp_path / "clip", image_size=32, patch_size=8, attentional_pool=True, attn_pooler_heads=2)
    encoder = ClipEncoder(str(folder), batch_size=4)
    assert encoder.features.has_patches and encoder.head() == {}
    assert encoder.encode_images(images).patch_features.shape == (5, 16, 32)


def test_logits_are_those_of_the_weights_in_any_precision(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip", image_size=32, patch_size=8)
    configured("model_cfg", init_logit_bias=-10)(folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights |= {"logit_scale": torch.tensor(4.7188), "logit_bias": torch.tensor(-16.7788)}
    save_file(weights, folder / "open_clip_model.safetensors")
    for dtype in ("float32", "bfloat16", "float16"):
        logits = ClipEncoder(str(folder), dtype=dtype).logits
        assert logits == {
            "logit_scale": torch.tensor(4.7188).exp().item(),
            "logit_bias": torch.tensor(-16.7788).item(),
        }


def test_a_folders_revision_is_its_content(tmp_path: Path) -> None:
    for name, content in {"a/x": b"1", "b/x": b"1", "c/y": b"1", "d/x": b"2"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    revision = {name: folder_revision(tmp_path / name) for name in "abcd"}
    assert revision["a"] == revision["b"]
    assert len({revision[name] for name in "acd"}) == 3
    assert folder_revision(tmp_path / "a/x") == folder_revision(tmp_path / "b/x") != folder_revision(tmp_path / "d/x")


def test_hidden_files_are_no_part_of_a_folders_revision_but_one_recorded_with_them_holds(tmp_path: Path) -> None:
    folder = tmp_path / ".cache/clip"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1")
    (folder / "open_clip_config.json").write_text("{}")
    plain = folder_revision(folder)
    noted = folder / ".cache/huggingface/weights.metadata"
    noted.parent.mkdir(parents=True)
    noted.write_text("1764482535.1")
    before = whole_folder_revision(folder)
    assert folder_revision(folder) == plain != before == folder_revision(folder, before)
    assert revision_here(str(folder), before) == before and revision_here(str(folder)) == plain
    noted.write_text("1764482999.9")
    assert folder_revision(folder, before) == plain
    (folder / "weights").write_bytes(b"2")
    assert folder_revision(folder, plain) != plain


def test_pictures_are_opened_a_batch_ahead_and_in_order(encoder: ClipEncoder, images: list[Image.Image]) -> None:
    expected = encoder.encode_images(images * 3)
    opened: list[int] = []
    at_forward: list[int] = []

    def opener(index: int) -> Callable[[], Image.Image]:
        def open_now() -> Image.Image:
            opened.append(index)
            return images[index % len(images)]

        return open_now

    hook = encoder._visual.conv1.register_forward_pre_hook(lambda *_: at_forward.append(len(opened)))
    encoded = encoder.encode_images([opener(index) for index in range(15)])
    hook.remove()
    np.testing.assert_array_equal(encoded.patch_features, expected.patch_features)
    assert sorted(opened) == list(range(15))
    assert all(count <= 4 * (batch + 2) for batch, count in enumerate(at_forward)), "one batch ahead, no more"


def test_a_picture_that_cannot_be_opened_raises_where_it_is_read(encoder: ClipEncoder) -> None:
    with pytest.raises(InputError, match="sample 7"):
        encoder.encode_images([partial(open_image, b"no picture", name="sample 7")])
