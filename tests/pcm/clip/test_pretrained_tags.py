"""Every pretrained tag runs as open_clip runs it with the tag's own configuration: activation, mean and std, size,
interpolation, cropping. The models are shrunk, and a tag's download is replaced by a file of random weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip

from benchmarks.shrunk_clips import distinct_tags, shrunk
from cluster.generation.pinning import require_joint_patches
from pcm.clip.encoder import ClipEncoder
from pcm.clip.names import activation_of
from pcm.clip.weights import tower_facts
from pcm.errors import InputError

TEXTS = ["a cat on the beach", "two dogs, with hats", "a photo of a " + "very " * 100 + "long day"]


def pictures() -> list[Image.Image]:
    """Wide and tall: cropping and squashing differ."""
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in ((12, 9), (7, 15))]
    return [image.resize((30 * image.width, 30 * image.height), Image.Resampling.BICUBIC) for image in small]


def compare(architecture: str, tag: str, folder: Path) -> None:
    wanted = open_clip.get_pretrained_cfg(architecture, tag)
    with shrunk(architecture, folder):
        model, _, preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=tag, force_quick_gelu=wanted.get("quick_gelu", False)
        )
        model.eval()
        tokenizer = open_clip.get_tokenizer(architecture)
        encoder = ClipEncoder(f"{architecture}/{tag}", batch_size=2)
    pixel_values = torch.stack([preprocess(image) for image in pictures()])  # (2, 3, H, W)
    assert torch.equal(torch.stack([encoder._pixels(image) for image in pictures()]), pixel_values)
    with torch.no_grad():
        image_features = model.encode_image(pixel_values, normalize=True).numpy()
        text_features = model.encode_text(tokenizer(TEXTS[:2]), normalize=True).numpy()
        long = model.encode_text(tokenizer(TEXTS[2:]).expand(2, -1), normalize=True).numpy()
    # Inference mode and the layout of tokens change the order of sums; the wrong activation differs by over 1e-3.
    np.testing.assert_allclose(encoder.encode_images(pictures()).global_feature, image_features, atol=2e-6)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS[:2]), text_features, atol=2e-6)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS[2:]), long[:1], atol=2e-6)
    check_head(encoder, model, pixel_values, image_features)
    assert np.abs(image_features[0] - image_features[1]).max() > 1e-3, "pictures are told apart"
    assert np.abs(text_features[0] - text_features[1]).max() > 1e-3, "so are texts"


def check_head(
    encoder: ClipEncoder, model: torch.nn.Module, pixel_values: torch.Tensor, image_features: np.ndarray
) -> None:
    """Of a tower that has one: it takes what the tower pools to the tower's own global feature."""
    head = encoder.head()
    patches = encoder.encode_images(pictures()).patch_features  # (2, N, D_v)
    assert patches.shape == (2, encoder.num_patches, encoder.patch_dim)
    if not encoder.features.has_patches:
        assert not head and not patches.any()
    if not head:
        return
    width = encoder.patch_dim
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "ln_post.weight": (width,), "ln_post.bias": (width,), "proj": (width, encoder.embed_dim)
    }  # fmt: skip
    with torch.no_grad():
        output = model.visual.forward_intermediates(
            pixel_values, indices=1, output_fmt="NLC" if hasattr(model.visual, "conv1") else "NCHW",
            output_extra_tokens=True,
        )  # fmt: skip
    prefix = output.get("image_intermediates_prefix")
    if pools_cls(model.visual):
        pooled = prefix[0][:, 0]
    elif getattr(model.visual, "final_ln_after_pool", False) or isinstance(model.visual.trunk.fc_norm, nn.LayerNorm):
        pooled = mean_token(output["image_intermediates"][-1])
    else:
        return  # norm before mean: of no single vector
    cls = nn.functional.layer_norm(pooled, (width,), head["ln_post.weight"], head["ln_post.bias"])
    again = nn.functional.normalize(cls @ head["proj"], dim=-1)
    np.testing.assert_allclose(again.numpy(), image_features, atol=1e-4)


def pools_cls(visual: nn.Module) -> bool:
    trunk = getattr(visual, "trunk", None)
    return visual.pool_type == "tok" if trunk is None else trunk.global_pool == "token"


def mean_token(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mean(dim=1) if tokens.ndim == 3 else tokens.mean(dim=(2, 3))


@pytest.mark.parametrize(("architecture", "tag"), distinct_tags(), ids=str)
def test_a_tag_runs_as_its_own_configuration_says(architecture: str, tag: str, tmp_path: Path) -> None:
    compare(architecture, tag, tmp_path)


def test_the_tag_decides_the_activation_whichever_of_the_two_names_is_given(tmp_path: Path) -> None:
    features = []
    for architecture in ("ViT-B-32", "ViT-B-32-quickgelu"):
        with shrunk(architecture, tmp_path) as weights:
            by_tag = ClipEncoder(f"{architecture}/openai", batch_size=2)
            by_file = ClipEncoder(f"{architecture}/{weights}", batch_size=2)
        assert by_tag.activation == "quick_gelu"
        assert by_file.activation == {"ViT-B-32": "gelu", "ViT-B-32-quickgelu": "quick_gelu"}[architecture]
        features += [encoder.encode_images(pictures()).patch_features for encoder in (by_tag, by_file)]
    plain_tag, plain_file, quick_tag, quick_file = features
    np.testing.assert_array_equal(plain_tag, quick_tag)
    np.testing.assert_array_equal(quick_tag, quick_file)
    assert np.abs(plain_file - quick_file).max() > 1e-3, "of a file the architecture's name decides"


def test_an_architecture_named_quickgelu_with_weights_trained_without_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32-quickgelu"], "plain", own)
    with pytest.raises(InputError, match="trained with GELU; give ViT-B-32/plain"):
        activation_of("ViT-B-32-quickgelu", "plain")


def test_features_recorded_with_another_activation_are_refused(tmp_path: Path) -> None:
    with shrunk("ViT-B-32", tmp_path), pytest.raises(InputError, match=r"activation is quick_gelu, .*made with gelu"):
        ClipEncoder("ViT-B-32/openai", activation="gelu")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "tag"), open_clip.list_pretrained(), ids=str)
def test_every_tag_runs_as_its_own_configuration_says(architecture: str, tag: str, tmp_path: Path) -> None:
    compare(architecture, tag, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "ViT-L-14/openai": "a global feature of 768 and 64 patches of 1024 with a head to the joint space, 132,608",
        "ViT-H-14-378/dfn5b": "a global feature of 1024 and 729 patches of 1280 with a head",
        "ViT-B-16-SigLIP2-256/webli": "a global feature of 768 and 64 patches of 768 without a head",
        "EVA02-L-14/merged2b_s4b_b131k": "a global feature of 768 and 64 patches of 1024 with a head",
        "RN50/openai": "a global feature of 1024 and no patches, 2,050 bytes a row",
    }.items(),
)
def test_what_a_clip_gives_is_known_before_its_weights_are_there(name: str, said: str) -> None:
    assert str(tower_facts(name)).startswith(said)


def test_a_captioner_that_needs_joint_patches_says_so_before_anything_is_downloaded() -> None:
    require_joint_patches("ViT-L-14/openai")
    for name in ("ViT-B-16-SigLIP2-256/webli", "RN50/openai"):
        with pytest.raises(InputError, match="PCM-Net needs patches in the joint space"):
            require_joint_patches(name)
