"""TrainConfig: strict, complete, and the published numbers."""

import dataclasses

import pytest

from cluster.options import parse_setting
from cluster.training.config import TRAINING_PRESETS, TrainConfig, default_preset, preset
from pcm.errors import InputError
from pcm.records import FeatureShape


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_json_round_trip_loses_nothing(name: str) -> None:
    import json

    config = preset(name)
    assert TrainConfig.from_json(json.dumps(config.to_dict()), source="test") == config


def test_presets_hold_the_published_hyper_parameters() -> None:
    hidden_dropout = {"coco_l14": 0.25, "coco_b32": 0.2, "flickr30k_l14": 0.2, "flickr30k_b32": 0.2}
    clip_weight = {"coco_l14": 4.0, "coco_b32": 2.5, "flickr30k_l14": 4.0, "flickr30k_b32": 2.5}
    for name, dropout in hidden_dropout.items():
        config = preset(name)
        assert (config.epochs, config.batch_size, config.warmup_steps, config.clip_value) == (12, 32, 10_000, 0.1)
        assert (config.adam_beta1, config.adam_beta2, config.label_smoothing) == (0.9, 0.999, 0.1)
        assert (config.focal_gamma, config.focal_mode, config.clip_weight) == (2.0, "batch", clip_weight[name])
        model = config.model
        assert (model.hidden_size, model.num_heads, model.intermediate_size) == (512, 8, 2048)
        assert (model.num_encoder_layers, model.num_decoder_layers, model.max_length) == (3, 3, 20)
        assert (model.hidden_dropout, model.attention_dropout, model.visual_dropout) == (dropout, 0.3, 0.5)
        assert (model.word_dropout, model.output_dropout, model.noise_variance) == (0.1, 0.5, 0.016)
        assert (model.top_concepts, model.top_patches, model.concept_threshold, model.tau) == (5, 5, 0.0, 0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1.0}, "'learning_rate': not known"),
        ({"model": {"hidden": 3}}, "'model.hidden': not known"),
        ({"epochs": "3"}, "epochs = '3': must be of type int"),
        ({"epochs": True}, "must be of type int"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be from 0 to below 2"),
        ({"seed": 2**63}, r"must be from 0 to below 2\*\*63"),  # torch takes no larger one
        ({"fraction": 0.0}, "fraction = 0.0: must be above 0 and at most 1"),
        ({"min_clip_score": 2.5}, "min_clip_score = 2.5: must be a cosine"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0: must be from 0 to below 1"),
        ({"grad_accumulation": 0}, "grad_accumulation = 0: must be at least 1"),
        ({"precision": "half"}, "must be one of auto, float32, bfloat16"),
        ({"feature_dtype": "int4"}, "must be one of float16, int8"),
        ({"compile": "max-autotune"}, "must be one of none, default, reduce-overhead"),
        ({"batch_size": 32, "grad_accumulation": 64}, "grad_accumulation = 64: must be a divisor of batch_size, 32"),
        ({"compile": "default", "grad_accumulation": 2}, "grad_accumulation = 2: must be 1 with compile = 'default'"),
        ({"focal_mode": "none"}, "focal_mode 'none'"),
        ([], "must be a JSON object"),
    ],
)
def test_wrong_configs_are_refused_by_name(values: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(values)


def test_overrides_reach_the_network_by_plain_names() -> None:
    config = preset("coco_l14").with_overrides({"top_concepts": 3, "batch_size": 64, "clip_weight": 3})
    assert (config.model.top_concepts, config.batch_size, config.clip_weight) == (3, 64, 3.0)
    assert preset("coco_l14").differences(config) == {
        "batch_size": "32 -> 64",
        "clip_weight": "4.0 -> 3.0",
        "top_concepts": "5 -> 3",
    }


def test_sizes_of_the_dataset_cannot_be_overridden() -> None:
    with pytest.raises(InputError, match="'vocab_size': comes from the dataset"):
        preset("coco_l14").with_overrides({"vocab_size": 10})


def test_for_dataset_fills_in_every_size_of_the_data() -> None:
    features = FeatureShape(embed_dim=192, patch_dim=200, num_patches=64)
    model = preset("embedded").for_dataset(vocab_size=99, features=features, num_concepts=30).model
    assert (model.vocab_size, model.num_concepts) == (99, 30)
    assert (model.embed_dim, model.patch_dim, model.num_patches) == (192, 200, 64)
    with pytest.raises(InputError, match="top_concepts 5: at most num_concepts, 4"):
        preset("embedded").for_dataset(vocab_size=99, features=features, num_concepts=4)
    wide = {"validation_beam_size": 100}
    with pytest.raises(InputError, match="validation_beam_size = 100: must be at most the size of the vocabulary, 99"):
        preset("embedded").for_dataset(vocab_size=99, features=features, num_concepts=30, overrides=wide)


def test_default_preset_follows_the_feature_sizes() -> None:
    sizes = {"coco_l14": (768, 1024, 64), "coco_b32": (512, 768, 49), "embedded": (192, 192, 64)}
    for name, (embed_dim, patch_dim, num_patches) in sizes.items():
        features = FeatureShape(embed_dim=embed_dim, patch_dim=patch_dim, num_patches=num_patches)
        assert default_preset(features) == name


def test_overrides_are_parsed_as_json_or_text() -> None:
    assert parse_setting("top_concepts=3") == ("top_concepts", 3)
    assert parse_setting("focal_mode=off") == ("focal_mode", "off")
    with pytest.raises(InputError, match="FIELD=VALUE"):
        parse_setting("top_concepts")


def test_configs_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("embedded").epochs = 3  # type: ignore[misc]
