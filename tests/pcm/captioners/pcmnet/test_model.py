"""PCMNet as a module: parity, purity, what is trained, what is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.captioners.pcmnet.model import PCMNet, sinusoid
from pcm.errors import InputError
from pcm.official.state_dict import config_from_state, from_official
from tests.helpers.paths import DATA

GOLDEN = load_file(DATA / "pcmnet_small.safetensors")
NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "visual_dropout": 0.0,
    "word_dropout": 0.0,
    "output_dropout": 0.0,
}
TINY = PCMNetConfig(
    vocab_size=11,
    patch_dim=8,
    embed_dim=6,
    num_patches=5,
    num_concepts=7,
    max_length=6,
    hidden_size=16,
    num_heads=2,
    intermediate_size=12,
    num_encoder_layers=2,
    num_decoder_layers=2,
    top_concepts=3,
    top_patches=4,
)


def golden_model() -> PCMNet:
    state = {n.removeprefix("state."): t for n, t in GOLDEN.items() if n.startswith("state.")}
    model = PCMNet(
        config_from_state(state, num_heads=4, num_concepts=20, max_length=12, noise_variance=0, **NO_DROPOUT)
    )
    model.load_state_dict(from_official(state))
    model.set_concepts(GOLDEN["in.concept_embed"])
    return model


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return GOLDEN["in.global_feats"], GOLDEN["in.att_feats"], GOLDEN["in.tokens_ids"]


def tiny(**changes) -> tuple[PCMNet, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    config = dataclasses.replace(TINY, **changes)
    model = PCMNet(config)
    model.set_concepts(torch.randn(config.num_concepts, config.embed_dim))
    inputs = (torch.randn(3, config.embed_dim), torch.randn(3, config.num_patches, config.patch_dim))
    return model, *inputs, torch.randint(1, config.vocab_size, (3, config.max_length))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_match_the_published_model_in_both_layouts(mode: str) -> None:
    with torch.no_grad():
        logits = golden_model().train(mode == "train")(*golden_inputs())
    torch.testing.assert_close(logits, GOLDEN[f"out.{mode}.logits"], atol=2e-5, rtol=0)


def test_layout_can_be_chosen_against_the_mode() -> None:
    with torch.no_grad():
        replaced = golden_model().eval()(*golden_inputs(), layout="replace")
        appended = golden_model().train()(*golden_inputs(), layout="append")
    torch.testing.assert_close(replaced, GOLDEN["out.train.logits"], atol=2e-5, rtol=0)
    torch.testing.assert_close(appended, GOLDEN["out.eval.logits"], atol=2e-5, rtol=0)


def test_inputs_are_never_changed() -> None:
    model, concepts = golden_model(), GOLDEN["in.concept_embed"].clone()
    inputs = [3 * tensor for tensor in golden_inputs()[:2]] + [golden_inputs()[2]]
    before = [tensor.clone() for tensor in inputs]
    model.set_concepts(concepts)
    for training in (True, False):
        model.train(training)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert torch.equal(concepts, GOLDEN["in.concept_embed"])


def test_the_scale_of_the_global_feature_does_not_matter() -> None:
    global_feature, *rest = golden_inputs()
    model = golden_model().eval()
    torch.testing.assert_close(model(1.7 * global_feature, *rest), model(global_feature, *rest), atol=2e-5, rtol=0)


def test_logits_depend_on_earlier_words_only() -> None:
    model, global_feature, patch_features, token_ids = tiny()
    model.eval()
    changed = token_ids.clone()
    changed[:, 3:] = 0
    full = model(global_feature, patch_features, token_ids)
    torch.testing.assert_close(model(global_feature, patch_features, changed)[:, :3], full[:, :3])
    assert not torch.allclose(model(global_feature, patch_features, changed)[:, 3], full[:, 3])
    torch.testing.assert_close(model(global_feature, patch_features, token_ids[:, :3]), full[:, :3])


def test_every_parameter_is_trained_and_the_clip_head_is_none() -> None:
    model, *inputs = tiny()
    logits = model.train()(*inputs)
    CLIPWeightedCrossEntropy()(logits, inputs[2], torch.full((3,), 0.2)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    trained = {name for name, _ in model.named_parameters()}
    head = {name for name in model.state_dict() if "clip_head" in name}
    assert len(head) == 3
    assert not head & trained


def test_concepts_are_not_in_the_state_dict_and_the_clip_head_is() -> None:
    state = tiny()[0].state_dict()
    assert not any("concept" in name or "word_embedding.position" in name for name in state)
    assert "visual_embedding.clip_head.proj" in state


def test_set_clip_head_copies_the_head() -> None:
    model, *_ = tiny()
    head = {"ln_post.weight": torch.rand(8), "ln_post.bias": torch.rand(8), "proj": torch.rand(8, 6)}
    model.set_clip_head(head)
    own = model.visual_embedding.clip_head
    assert torch.equal(own.proj, head["proj"])
    assert torch.equal(own.ln_post_weight, head["ln_post.weight"])
    assert torch.equal(own.ln_post_bias, head["ln_post.bias"])
    head["proj"].zero_()
    assert own.proj.abs().max() > 0


@pytest.mark.parametrize(
    "head", [{}, {"ln_post.weight": torch.ones(8), "ln_post.bias": torch.ones(8), "proj": torch.ones(6, 8)}]
)
def test_a_clip_head_that_does_not_fit_is_refused(head: dict) -> None:
    with pytest.raises(InputError, match="CLIP head"):
        tiny()[0].set_clip_head(head)


@pytest.mark.parametrize(
    "concepts", [torch.ones(7, 5), torch.ones(6, 6), torch.zeros(7, 6), torch.full((7, 6), float("nan"))]
)
def test_concepts_that_do_not_fit_are_refused(concepts: torch.Tensor) -> None:
    with pytest.raises(InputError, match="concept embeddings"):
        tiny()[0].set_concepts(concepts)


def test_concepts_are_kept_normalised() -> None:
    model, *_ = tiny()
    model.set_concepts(torch.arange(1.0, 43.0).view(7, 6))
    torch.testing.assert_close(model.concept_embeddings.norm(dim=-1), torch.ones(7))


def test_a_model_without_concepts_says_so() -> None:
    with pytest.raises(InputError, match="set_concepts"):
        PCMNet(TINY).encode(torch.ones(1, 6), torch.ones(1, 5, 8))


@pytest.mark.parametrize(
    ("global_feature", "patch_features", "token_ids", "named"),
    [
        (torch.ones(3, 5), torch.ones(3, 5, 8), torch.ones(3, 2).long(), "global_feature"),
        (torch.ones(3, 6), torch.ones(3, 4, 8), torch.ones(3, 2).long(), "patch_features"),
        (torch.ones(3, 6), torch.ones(2, 5, 8), torch.ones(3, 2).long(), "patch_features"),
        (torch.ones(3, 6), torch.ones(3, 5, 8), torch.ones(3, 7).long(), "max_length"),
    ],
)
def test_inputs_of_another_shape_are_refused_by_name(global_feature, patch_features, token_ids, named: str) -> None:
    with pytest.raises(InputError, match=named):
        tiny()[0](global_feature, patch_features, token_ids)


def test_an_unknown_layout_is_refused() -> None:
    model, *inputs = tiny()
    with pytest.raises(InputError, match="layout"):
        model(*inputs, layout="prepend")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 15},
        {"num_heads": 3},
        {"top_concepts": 8},
        {"top_patches": 16},
        {"top_patches": -1},
        {"tau": 0.0},
        {"temperature": 0.0},
        {"visual_dropout": 1.0},
        {"noise_variance": -0.1},
        {"vocab_size": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_impossible_configs_are_refused_by_name(changes: dict) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        dataclasses.replace(TINY, **changes)


def test_noise_is_added_in_training_only() -> None:
    model, *inputs = tiny(noise_variance=0.5, **NO_DROPOUT)
    assert not torch.equal(model.train()(*inputs), model.train()(*inputs))
    assert torch.equal(model.eval()(*inputs), model.eval()(*inputs))
    quiet, *inputs = tiny(noise_variance=0.0, **NO_DROPOUT)
    assert torch.equal(quiet.train()(*inputs), quiet.train()(*inputs))


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_each_dropout_acts_in_training_only(name: str) -> None:
    model, *inputs = tiny(noise_variance=0.0, **{**NO_DROPOUT, name: 0.5})
    assert not torch.equal(model.train()(*inputs), model.train()(*inputs))
    assert torch.equal(model.eval()(*inputs), model.eval()(*inputs))


def test_training_attention_equals_evaluation_attention_up_to_dropout() -> None:
    # A tiny dropout takes torch's path for training but drops nothing.
    model, *inputs = tiny(noise_variance=0.0, **{**NO_DROPOUT, "attention_dropout": 1e-9})
    for layout in ("replace", "append"):
        explicit = model.train()(*inputs, layout=layout)
        torch.testing.assert_close(explicit, model.eval()(*inputs, layout=layout))


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = PCMNet(dataclasses.replace(TINY, hidden_size=64, intermediate_size=256, num_patches=200, top_patches=4))
    assert model.visual_embedding.position.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.word_embedding.embedding.weight.std().item() == pytest.approx(1.0, rel=0.1)
    for weight in (model.decoder[0].cross_attention.key_value.weight, model.decoder[0].cross_attention.query.weight):
        bound = 64**-0.5  # nn.Linear's default for 64 inputs, whatever the number of outputs
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_word_positions_are_interleaved_sines_and_cosines() -> None:
    table = sinusoid(50, 8)
    torch.testing.assert_close(table[:, 0], torch.sin(torch.arange(50.0)))
    torch.testing.assert_close(table[:, 1], torch.cos(torch.arange(50.0)))
    torch.testing.assert_close(table[:, 2], torch.sin(torch.arange(50.0) / 10), atol=1e-5, rtol=0)


def test_bfloat16_autocast_trains_with_finite_gradients() -> None:
    model, *inputs = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.train()(*inputs)
    assert logits.dtype == torch.bfloat16
    CLIPWeightedCrossEntropy()(logits, inputs[2], torch.full((3,), 0.2)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low = model.eval()(*inputs).float()
    torch.testing.assert_close(low, model.eval()(*inputs), atol=0.1, rtol=0.1)


def test_encode_shows_what_captioning_reports() -> None:
    model, global_feature, patch_features, _ = tiny()
    found = model.eval().encode(global_feature, patch_features).mixup
    assert found.top_concepts.shape == found.top_probabilities.shape == (3, 3)
    assert found.patch_concept_similarity.shape == (3, 5, 3)
    assert found.mix_mask.shape == (3, 5)
    assert found.mix_mask.dtype == torch.bool


def test_published_size_has_about_35_million_trainable_parameters() -> None:
    with torch.device("meta"):
        model = PCMNet(PCMNetConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(35e6, rel=0.03)
