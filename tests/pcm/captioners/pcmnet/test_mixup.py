"""The patch-wise cross-modal mix-up, rule by rule and against the slow implementation."""

import pytest
import torch
from safetensors.torch import load_file

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.mixup import (
    inject_noise,
    patch_concept_similarity,
    retrieve_concepts,
    select_pairs,
    textual_patches,
    unit,
)
from pcm.captioners.pcmnet.model import PCMNet
from pcm.official.state_dict import config_from_state, from_official
from tests.helpers.paths import DATA
from tests.helpers.slow_pcmnet import Settings, SlowPCMNet
from tests.helpers.tiny_goldens import Sizes, random_state

GOLDEN = load_file(DATA / "pcmnet_small.safetensors")


def example(settings: Settings, *, seed: int = 0) -> tuple[PCMNet, SlowPCMNet, torch.Tensor, torch.Tensor]:
    """A model in eval mode, the slow one with the same weights, and a batch of two pictures' features."""
    sizes = Sizes()
    generator = torch.Generator().manual_seed(seed)
    state = random_state(sizes, settings, generator)
    concepts = torch.randn(sizes.num_concepts, sizes.embed_dim, generator=generator)
    config = config_from_state(
        state,
        num_heads=settings.heads,
        num_concepts=sizes.num_concepts,
        top_concepts=settings.topk,
        top_patches=settings.topk2,
        concept_threshold=settings.thres,
        max_length=settings.max_seq_len,
    )
    model = PCMNet(config)
    model.load_state_dict(from_official(state))
    model.set_concepts(concepts)
    global_feature = (concepts[:2] + concepts[1:3]) / 8
    patch_features = torch.randn(2, sizes.num_patches, sizes.patch_dim, generator=generator)
    return model.eval(), SlowPCMNet(state, concepts, settings), global_feature, patch_features


@pytest.mark.parametrize(
    "settings",
    [
        Settings(3, 1, 1, 4, 3, 4, 0.05),
        Settings(3, 1, 1, 4, 2, 0.35, 0.0),
        Settings(3, 1, 1, 4, 7, 9, -1.0),  # 0.0 would drop probabilities that underflow in float32
        Settings(3, 1, 1, 4, 1, 5, 0.0),
    ],
    ids=["threshold", "fraction", "every-concept", "every-patch"],
)
def test_findings_match_the_slow_implementation(settings: Settings) -> None:
    model, slow, global_feature, patch_features = example(settings)
    found = model.find_pairs(global_feature, patch_features)
    for b in range(2):
        expected = slow.mixup(global_feature[b].double(), patch_features[b].double())
        assert found.top_concepts[b].tolist() == expected["top"]
        assert found.kept[b].tolist() == expected["kept"]
        assert set(found.selected_pairs[b].tolist()) == set(expected["pairs"])
        assert set(found.mix_mask[b].nonzero()[:, 0].tolist()) == expected["chosen"]
        similarity = found.patch_concept_similarity[b].double()
        torch.testing.assert_close(similarity, expected["affinities"], atol=1e-5, rtol=0)


def test_concepts_come_best_first_with_probabilities_of_the_whole_vocabulary() -> None:
    probabilities, top, indices, kept = retrieve_concepts(
        unit(torch.tensor([[1.0, 0.2, 0.0]])),
        torch.eye(3),
        top_concepts=2,
        threshold=0.0,
        temperature=1.0,
    )
    assert indices.tolist() == [[0, 1]]
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert top.sum() < 1  # the third concept has its share
    assert kept.all()


def test_threshold_is_strict_and_on_the_probability() -> None:
    # Two concepts of equal cosine: each has probability exactly one half.
    settings = {"top_concepts": 2, "temperature": 0.01}
    feature, concepts = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert not retrieve_concepts(feature, concepts, threshold=0.5, **settings)[3].any()
    assert retrieve_concepts(feature, concepts, threshold=0.4999, **settings)[3].all()


def test_a_dropped_concept_stays_in_the_softmax_and_dilutes_the_mixture() -> None:
    concept = unit(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))  # the second one was dropped
    similarity = patch_concept_similarity(torch.tensor([[[0.6, 0.8], [-0.6, -0.8], [0.8, -0.6]]]), concept)
    mixed = textual_patches(similarity, concept, tau=1.0)[0]
    weights = torch.sigmoid(torch.tensor([1.0, -1.0, 0.0]))  # softmax against the dropped concept's logit 0
    torch.testing.assert_close(mixed, weights[:, None] * concept[0, :1])


def test_the_largest_pairs_select_their_patches_and_one_patch_may_own_several() -> None:
    similarity = torch.tensor([[[0.9, 0.8], [0.1, 0.2], [0.7, 0.0]]])
    _, pairs, mask = select_pairs(similarity, num_pairs=2, tau=0.1)
    assert pairs.tolist() == [[0, 1]]
    assert mask.tolist() == [[True, False, False]]
    _, pairs, mask = select_pairs(similarity, num_pairs=3, tau=0.1)
    assert pairs.tolist() == [[0, 1, 4]]
    assert mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize(("top_patches", "pairs"), [(0, 0), (5.0, 5), (1, 1), (0.3, 9), (0.01, 0)])
def test_top_patches_is_a_count_or_a_fraction_of_all_pairs(top_patches: float, pairs: int) -> None:
    assert PCMNetConfig(num_patches=6, top_concepts=5, top_patches=top_patches).num_pairs == pairs


def test_training_layout_changes_selected_patches_only() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 4, 0.0))
    embedding = model.visual_embedding
    mixed, mask, found = embedding(global_feature, patch_features, model.concept_embeddings, layout="replace")
    both, _, _ = embedding(global_feature, patch_features, model.concept_embeddings, layout="append")
    num_patches = patch_features.shape[1]
    assert mask is None
    assert mixed.shape[1] == 1 + num_patches
    assert 0 < found.mix_mask.sum() < found.mix_mask.numel()
    torch.testing.assert_close(mixed[:, 0], both[:, 0])
    textual = found.mix_mask.unsqueeze(-1)
    expected = torch.where(textual, both[:, 1 + num_patches :], both[:, 1 : 1 + num_patches])
    torch.testing.assert_close(mixed[:, 1:], expected)


def test_append_layout_masks_unselected_textual_patches_only() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 4, 0.0))
    encoded = model.encode(global_feature, patch_features, layout="append")
    num_patches = patch_features.shape[1]
    assert encoded.mask[:, : 1 + num_patches].all()
    assert torch.equal(encoded.mask[:, 1 + num_patches :], encoded.mixup.mix_mask)


@pytest.mark.parametrize("top_patches", [0, 1, 4, 15, 0.5])
def test_append_selected_shows_the_decoder_what_append_shows(top_patches: float) -> None:
    model, _, global_feature, patch_features = example(Settings(3, 2, 1, 4, 3, top_patches, 0.0))
    full = model.encode(global_feature, patch_features, layout="append")
    short = model.encode(global_feature, patch_features, layout="append_selected")
    assert short.memory.shape[1] == 1 + 5 + min(model.config.num_pairs, 5)
    for b in range(2):
        torch.testing.assert_close(short.memory[b][short.mask[b]], full.memory[b][full.mask[b]])


def test_without_pairs_the_picture_enters_unmixed() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 0, 0.0))
    encoded = model.encode(global_feature, patch_features, layout="replace")
    assert not encoded.mixup.mix_mask.any()
    torch.testing.assert_close(encoded.memory, model.encode(global_feature, patch_features).memory)


def test_noise_formula_matches_the_published_one() -> None:
    noisy = inject_noise(GOLDEN["in.global_feats"], variance=0.016, noise=GOLDEN["extra.noise.gauss"])
    torch.testing.assert_close(noisy, GOLDEN["extra.noise.out"], atol=1e-6, rtol=0)


def test_noise_has_the_stated_variance() -> None:
    torch.manual_seed(0)
    feature = unit(torch.ones(1, 4)).expand(20_000, -1)
    noisy = inject_noise(feature, variance=1e-4)
    spread = (noisy - noisy.mean(0)).square().sum(-1).mean()
    # To first order normalisation removes the component along the feature: 3 of 4 dimensions are left.
    assert spread.item() == pytest.approx(3e-4, rel=0.05)
    assert noisy.norm(dim=-1).allclose(torch.ones(1))


def test_a_zero_feature_gives_finite_findings() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 4, 0.0))
    encoded = model.encode(torch.zeros_like(global_feature), torch.zeros_like(patch_features))
    assert encoded.memory.isfinite().all()


def test_findings_are_float32_and_equal_under_autocast() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 4, 0.0))
    plain = model.find_pairs(global_feature, patch_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.encode(global_feature, patch_features).mixup
    assert low.patch_concept_similarity.dtype == torch.float32
    assert torch.equal(low.patch_concept_similarity, plain.patch_concept_similarity)
    assert torch.equal(low.mix_mask, plain.mix_mask)


def test_half_precision_features_are_accepted() -> None:
    model, _, global_feature, patch_features = example(Settings(3, 1, 1, 4, 3, 4, 0.0))
    half = model.encode(global_feature.half(), patch_features.half())
    exact = model.encode(global_feature.half().float(), patch_features.half().float())
    assert torch.equal(half.memory, exact.memory)
