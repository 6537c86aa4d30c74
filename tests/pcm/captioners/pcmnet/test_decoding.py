"""Beam search and greedy decoding: the published rules, and that caches and early stops change nothing."""

import pytest
import torch
from safetensors.torch import load_file

from pcm.captioners.pcmnet import decoding
from pcm.captioners.pcmnet.decoding import beam_search, greedy_search
from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError
from tests.helpers.paths import DATA
from tests.pcm.captioners.pcmnet.test_model import golden_inputs, golden_model, tiny

GOLDEN = load_file(DATA / "pcmnet_small.safetensors")


def many_pictures(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features between the golden pictures, whose captions end at different steps."""
    torch.manual_seed(0)
    global_feature, patch_features, _ = golden_inputs()
    share = torch.softmax(2 * torch.randn(count, len(global_feature)), dim=-1)
    return share @ global_feature, torch.einsum("cb,bnd->cnd", share, patch_features)


def after_end(token_ids: torch.Tensor) -> torch.Tensor:
    """True at positions behind a hypothesis' first 0."""
    ended = (token_ids == 0).cumsum(-1)
    return (ended - (token_ids == 0).long()) > 0


@pytest.mark.parametrize(("beam_size", "out_size"), [(3, 1), (3, 3), (5, 1), (5, 5)])
def test_beam_search_matches_the_published_one(beam_size: int, out_size: int) -> None:
    decoded = beam_search(golden_model().eval(), *golden_inputs()[:2], beam_size=beam_size, out_size=out_size)
    name = f"beam{beam_size}.out{out_size}"
    assert torch.equal(decoded.token_ids, GOLDEN[f"{name}.ids"])
    torch.testing.assert_close(decoded.log_probs, GOLDEN[f"{name}.logp"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("search", [greedy_search, lambda *inputs: beam_search(*inputs, beam_size=1)])
def test_greedy_and_beam_one_match_the_published_greedy(search) -> None:
    decoded = search(golden_model().eval(), *golden_inputs()[:2])
    assert torch.equal(decoded.token_ids, GOLDEN["greedy.ids"])
    torch.testing.assert_close(decoded.log_probs, GOLDEN["greedy.logp"], atol=2e-5, rtol=0)


def test_hypotheses_come_best_first() -> None:
    decoded = beam_search(golden_model().eval(), *many_pictures(), beam_size=4, out_size=4)
    scores = decoded.log_probs.sum(-1)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_finished_hypotheses_keep_their_score() -> None:
    decoded = beam_search(golden_model().eval(), *many_pictures(), beam_size=4, out_size=4)
    behind = after_end(decoded.token_ids)
    assert behind.any()
    assert decoded.log_probs[behind].abs().max() == 0
    assert decoded.token_ids[behind].abs().max() == 0


def test_cached_steps_give_the_log_probabilities_of_teacher_forcing() -> None:
    model, (global_feature, patch_features) = golden_model().eval(), many_pictures()
    decoded = beam_search(model, global_feature, patch_features, beam_size=3, out_size=3)
    for hypothesis in range(3):
        ids = decoded.token_ids[:, hypothesis]
        inputs = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
        with torch.no_grad():
            forced = model(global_feature, patch_features, inputs, layout="append").log_softmax(-1)
        forced = forced.gather(-1, ids.unsqueeze(-1)).squeeze(-1).masked_fill(after_end(ids), 0.0)
        torch.testing.assert_close(decoded.log_probs[:, hypothesis], forced, atol=2e-5, rtol=0)


@pytest.mark.parametrize("share", [0.01, 0.5, 2.0])
def test_leaving_the_batch_early_changes_nothing(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = golden_model().eval(), many_pictures()
    alone = [beam_search(model, g[None], p[None], beam_size=3, out_size=3) for g, p in zip(*inputs, strict=True)]
    lengths = [int((one.token_ids != 0).any(dim=1).sum()) for one in alone]
    assert len(set(lengths)) > 2  # the pictures do end at different steps
    monkeypatch.setattr(decoding, "_SHRINK_SHARE", share)
    together = beam_search(model, *inputs, beam_size=3, out_size=3)
    assert torch.equal(together.token_ids, torch.cat([one.token_ids for one in alone]))
    expected = torch.cat([one.log_probs for one in alone])
    torch.testing.assert_close(together.log_probs, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_the_leading_hypotheses_are_those_of_a_search_for_all(beam_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for fewer ends as soon as they cannot be overtaken, which must not show."""
    model, inputs = golden_model().eval(), many_pictures(64)
    with torch.no_grad():
        model.output.bias[0] += 0.7  # captions of many lengths
    whole = beam_search(model, *inputs, beam_size=beam_size, out_size=beam_size)
    steps = []
    step = decoding._Decoder.best_words
    monkeypatch.setattr(
        decoding._Decoder, "best_words", lambda self, *a, **k: (steps.append(len(a[0])), step(self, *a, **k))[1]
    )
    decoded_rows = []
    for out_size in range(1, beam_size + 1):
        steps.clear()
        decoded = beam_search(model, *inputs, beam_size=beam_size, out_size=out_size)
        token_ids = decoded.token_ids.view(64, out_size, -1)
        assert torch.equal(token_ids, whole.token_ids[:, :out_size])
        expected = whole.log_probs[:, :out_size]
        torch.testing.assert_close(decoded.log_probs.view(64, out_size, -1), expected, atol=2e-5, rtol=0)
        decoded_rows.append(sum(steps))
    assert decoded_rows[0] < 0.9 * decoded_rows[-1]
    assert len(set((whole.token_ids[:, 0] != 0).sum(dim=-1).tolist())) > 2


def test_search_stops_when_every_caption_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = golden_model().eval(), many_pictures()
    with torch.no_grad():
        model.output.bias[0] += 100.0  # the end is always the best word
    steps = []
    step = decoding._Decoder.best_words
    monkeypatch.setattr(
        decoding._Decoder, "best_words", lambda self, *a, **k: (steps.append(a[1]), step(self, *a, **k))[1]
    )
    assert greedy_search(model, *inputs).token_ids.abs().max() == 0
    assert steps == [0]
    steps.clear()
    assert beam_search(model, *inputs).token_ids.abs().max() == 0
    assert len(steps) < model.config.max_length


def test_a_caption_that_never_ends_fills_all_positions() -> None:
    model, inputs = golden_model().eval(), many_pictures()
    with torch.no_grad():
        model.output.bias[0] -= 1000.0
    for decoded in (beam_search(model, *inputs), greedy_search(model, *inputs)):
        assert (decoded.token_ids > 0).all()
        assert decoded.token_ids.shape == (12, 12)


def test_greedy_goes_on_recording_until_the_last_caption_has_ended() -> None:
    decoded = greedy_search(golden_model().eval(), *many_pictures())
    last = int((decoded.token_ids != 0).any(dim=0).sum())  # the longest caption ends here, or at T
    assert (decoded.log_probs[:, : last + 1] < 0).all()
    assert decoded.log_probs[:, last + 1 :].abs().max() == 0 if last + 1 < 12 else True
    assert after_end(decoded.token_ids)[:, : last + 1].any()


def test_max_length_cuts_the_search_short() -> None:
    model, inputs = golden_model().eval(), many_pictures()
    short, full = greedy_search(model, *inputs, max_length=3), greedy_search(model, *inputs)
    assert short.token_ids.shape == (12, 3)
    assert torch.equal(short.token_ids, full.token_ids[:, :3])


def test_the_beam_can_be_as_wide_as_the_vocabulary() -> None:
    model, global_feature, patch_features, _ = tiny()
    decoded = beam_search(model.eval(), global_feature, patch_features, beam_size=11, out_size=11, max_length=1)
    assert all(sorted(words) == list(range(11)) for words in decoded.token_ids[:, :, 0].tolist())


def test_hypotheses_share_the_keys_and_values_of_their_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, global_feature, patch_features, _ = tiny()
    seen = []
    start = decoding._Decoder.__init__

    def remember(self, *arguments, **settings) -> None:
        start(self, *arguments, **settings)
        seen.append(self)

    monkeypatch.setattr(decoding._Decoder, "__init__", remember)
    monkeypatch.setattr(decoding, "_SHRINK_SHARE", 2.0)
    beam_search(model.eval(), global_feature, patch_features, beam_size=4)
    keys, _ = seen[0].cross_caches[0]
    assert keys.shape[0] == len(global_feature)


def test_results_carry_no_gradient_and_leave_the_inputs_alone() -> None:
    model, global_feature, patch_features, _ = tiny()
    before = (global_feature.clone(), patch_features.clone())
    decoded = beam_search(model.eval(), global_feature, patch_features)
    assert not decoded.log_probs.requires_grad
    assert torch.equal(global_feature, before[0])
    assert torch.equal(patch_features, before[1])


def test_a_model_in_training_mode_is_refused() -> None:
    model, global_feature, patch_features, _ = tiny()
    for search in (beam_search, greedy_search):
        with pytest.raises(InputError, match="eval"):
            search(model.train(), global_feature, patch_features)


@pytest.mark.parametrize(
    "settings",
    [{"beam_size": 0}, {"beam_size": 2, "out_size": 3}, {"beam_size": 12}, {"max_length": 7}, {"max_length": 0}],
)
def test_searches_that_do_not_fit_are_refused(settings: dict) -> None:
    model, global_feature, patch_features, _ = tiny()
    with pytest.raises(InputError):
        beam_search(model.eval(), global_feature, patch_features, **settings)


def other_model() -> PCMNet:
    """The golden network with every weight moved a little."""
    model = golden_model().eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def mean_log_probs(
    models: list[PCMNet], pictures: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """log of the mean of the models' probabilities of the next word, (B, T, V), without any cache."""
    inputs = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), ids[:, :-1]], dim=1)
    return torch.stack([model(*pictures, inputs).softmax(-1) for model in models]).mean(0).log()


@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_ensemble_takes_the_mean_of_the_probabilities(beam_size: int) -> None:
    models, pictures = [golden_model().eval(), other_model()], many_pictures()
    found = beam_search(models[0], *pictures, beam_size=beam_size, others=models[1:])
    expected = mean_log_probs(models, pictures, found.token_ids)
    words = ~after_end(found.token_ids)
    chosen = expected.gather(2, found.token_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.log_probs[words], chosen[words], atol=2e-5, rtol=0)
    if beam_size == 1:
        assert torch.equal(found.token_ids[words], expected.argmax(-1)[words])
    alone = [beam_search(model, *pictures, beam_size=beam_size).token_ids for model in models]
    assert not any(torch.equal(found.token_ids, ids) for ids in alone)
