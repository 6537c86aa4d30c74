"""Training of the embedded text-to-image model, in miniature: its parts, its resumption, and the folder it writes."""

import numpy as np
import pytest
import torch

from tests.helpers.tiny_scenes import square_scenes

import pcm.torchvision_shim  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from pcm.embedded.making import autoencoder_training, denoiser_training, t2i_training, text_training
from pcm.embedded.making.autoencoder_training import AutoencoderTraining, reconstruction_loss
from pcm.embedded.making.denoiser_training import DenoiserTraining, spread_times
from pcm.embedded.making.earlier_denoiser import begun_denoiser, predicting
from pcm.embedded.making.t2i_training import PainterTraining, train_painter
from pcm.embedded.making.text_training import TextTraining, text_states
from pcm.embedded.making.tokens import build_tokenizer
from pcm.embedded.making.training_state import rate_factor

TINY = PainterTraining(
    autoencoder=AutoencoderTraining(steps=4, decoder_steps=2, checkpoint_every=3),
    text=TextTraining(steps=4, batch_size=8, checkpoint_every=2),
    denoiser=DenoiserTraining(steps=4, batch_size=4, checkpoint_every=2),
)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painter")
    train_painter(square_scenes(24, seed=1), folder, TINY)
    return folder


def test_the_folder_is_an_ordinary_pipeline_that_draws(trained):
    pipeline = DiffusionPipeline.from_pretrained(trained / "t2i")
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat on the grass"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32


def test_what_is_trained_to_the_end_is_not_trained_again(trained, monkeypatch):
    monkeypatch.setattr(t2i_training, "train_denoiser", None)  # calling it would fail
    before = (trained / "t2i/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert train_painter(square_scenes(24, seed=1), trained, TINY)["steps"] == TINY.denoiser.steps
    assert (trained / "t2i/unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_weights_are_stored_in_half_precision(trained):
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        weights = load_file(trained / "t2i" / f"{part}.safetensors")
        assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float16}


def test_a_training_killed_in_every_stage_resumes_to_the_same_weights(trained, tmp_path):
    data = square_scenes(24, seed=1)
    for module in (autoencoder_training, text_training, denoiser_training):
        save = module.save_state

        def die_after_the_first(path, state, save=save):
            save(path, state)
            raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, "save_state", die_after_the_first)
            train_painter(data, tmp_path, TINY)
    train_painter(data, tmp_path, TINY)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        first, second = (load_file(folder / "t2i" / f"{part}.safetensors") for folder in (trained, tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_painter_may_begin_with_an_earlier_one(trained, tmp_path):
    """Latents and their scale stay as they are; the decoder and the denoiser learn on."""
    train_painter(square_scenes(24, seed=1), tmp_path, TINY, begin_with=trained / "t2i")
    first, second = (
        load_file(folder / "t2i/vae/diffusion_pytorch_model.safetensors") for folder in (trained, tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("encoder."))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith("decoder."))
    scales = [DiffusionPipeline.from_pretrained(f / "t2i").vae.config.scaling_factor for f in (trained, tmp_path)]
    assert scales[0] == scales[1]


def test_a_begun_denoiser_reads_another_text_encoder_as_it_read_its_own(trained):
    folder = trained / "t2i"
    pipeline = DiffusionPipeline.from_pretrained(folder)
    captions = [*square_scenes(24, seed=1).captions[0][:2], "a cat on the grass"]
    begun = begun_denoiser(folder, pipeline.text_encoder, pipeline.tokenizer, captions)
    states = text_states(pipeline.text_encoder, pipeline.tokenizer, captions).float()
    read = 0
    for name, weight in pipeline.unet.state_dict().items():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            read += 1
            wanted = states @ weight.T
            assert (states @ begun[name].T - wanted).abs().mean() < 0.05 * wanted.abs().mean()
        else:
            assert torch.equal(begun[name], weight)
    assert read == 12  # keys and values of six layers


def test_a_begun_denoiser_needs_words_that_both_tokenizers_know(trained):
    pipeline = DiffusionPipeline.from_pretrained(trained / "t2i")
    letters = CLIPTokenizer(vocab={"a</w>": 0, "a": 1, "b": 2, "<|endoftext|>": 3, "<|startoftext|>": 4}, merges=[])
    with pytest.raises(ValueError, match="none of 1 captions"):
        begun_denoiser(trained / "t2i", pipeline.text_encoder, letters, ["horse"])


def test_predicting_finds_the_linear_map():
    torch.manual_seed(0)
    states, wanted = torch.randn(200, 6), torch.randn(6, 4)
    assert torch.allclose(predicting(states, states @ wanted), wanted, atol=1e-2)


def test_the_text_encoder_learns_what_stands_where(tmp_path):
    from transformers import CLIPTokenizer

    build_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    data = square_scenes(96, seed=1)
    encoder = text_training.train_text_encoder(
        data, tokenizer, tmp_path, TextTraining(steps=50, batch_size=16, rate=5e-3)
    )
    reader = text_training.SceneReader(data.nouns.shape[1])
    reader.load_state_dict(torch.load(tmp_path / "text.pt", weights_only=True)["reader"])
    ids, padding = text_training._tokens(tokenizer, [row[0] for row in data.captions])
    with torch.no_grad():
        nouns = reader(encoder(ids).last_hidden_state, padding)[0].argmax(-1).numpy()
    assert (nouns[:, 0] == data.nouns[:, 0]).mean() > 0.6  # chance: 1 in 4
    states = text_states(encoder, tokenizer, ["", "a cat"])
    assert states.shape == (2, 24, text_training.WIDTH) and states.dtype == torch.float16


def test_blurred_edges_cost_more_than_a_tint_of_the_same_size():
    picture = torch.zeros(1, 3, 8, 8)
    picture[..., 4:] = 1
    tinted = picture + 0.1
    wrong_edge = picture.clone()
    wrong_edge[..., 3] += 0.1 * 8**0.5  # the same squared error, all of it at the edge
    assert reconstruction_loss(wrong_edge, picture, edges=0.5) > 1.5 * reconstruction_loss(tinted, picture, edges=0.5)
    assert reconstruction_loss(picture, picture, edges=0.5) == 0


def test_time_steps_are_spread_over_the_whole_range():
    torch.manual_seed(0)
    times = spread_times(10, 1000)
    assert sorted(int(time) // 100 for time in times) == list(range(10))
    assert set(spread_times(1000, 1000).tolist()) == set(range(1000))


def test_the_rate_rises_holds_and_falls():
    factors = [rate_factor(step, 100, warmup=10, cooldown=0.5) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(factors[9:50]) == {1.0} and factors[50:] == sorted(factors[50:], reverse=True) and factors[-1] < 0.01
