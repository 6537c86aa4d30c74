"""Training of the embedded CLIP, on squares instead of drawings."""

from pathlib import Path

import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
from pcm.embedded.making.clip_training import ClipTraining, copy_weights, encode_short, measure, new_clip, train_clip
from pcm.embedded.making.clip_views import GRID, KeepSomePatches, as_input, augment, moved, patch_labels, present_nouns
from pcm.embedded.making.tokens import build_tokenizer
from pcm.embedded.making.world import NOUNS
from pcm.errors import InputError
from tests.helpers.tiny_scenes import square_scenes

NONE = len(NOUNS)


def test_patches_are_labelled_with_the_thing_that_covers_their_centre():
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [28.0, 40.0, 60.0, 64.0], [0.0, 0.0, 0.0, 0.0]]])
    labels = patch_labels(torch.tensor([[5, 7, -1]]), boxes).view(GRID, GRID)
    assert labels[0, 0] == labels[3, 3] == 5 and labels[5, 4] == labels[7, 6] == 7
    assert labels[0, 4] == labels[4, 0] == labels[7, 7] == NONE
    assert (labels == 5).sum() == 16


def test_nouns_in_a_picture():
    present = present_nouns(torch.tensor([[3, 3, -1], [0, 4, NONE - 1]]))
    assert [row.nonzero().flatten().tolist() for row in present] == [[3], [0, 4, NONE - 1]]


def test_boxes_move_with_their_things():
    torch.manual_seed(0)
    pictures = torch.full((16, 3, 64, 64), -1.0)
    pictures[:, :, 20:40, 10:30] = 1.0
    boxes = torch.tensor([10.0, 20.0, 30.0, 40.0]).expand(16, 1, 4)
    turned, corners = moved(pictures, boxes)
    assert not torch.allclose(corners, boxes.contiguous(), atol=1.0)
    for picture, (left, top, right, bottom) in zip(turned[:, 0], corners[:, 0].tolist(), strict=True):
        rows, columns = (picture[8:56, 8:56] > 0).nonzero().unbind(1)  # mirrored margins may show the square again
        found = [columns.min() + 8, rows.min() + 8, columns.max() + 9, rows.max() + 9]
        assert found == pytest.approx([left, top, right, bottom], abs=1.2) or min(left, top) < 8


def test_other_views_keep_shape_and_range():
    pictures = as_input(square_scenes(4, seed=1).images)
    views = augment(pictures)
    assert views.shape == pictures.shape and views.abs().max() <= 1 and not torch.equal(views, pictures)


def test_preferred_patches_are_kept_and_all_of_them_outside_training():
    dropout = KeepSomePatches(6).train()
    tokens = torch.arange(10.0)[None, :, None].expand(1, -1, 2)
    dropout.preferred, dropout.favour = torch.zeros(1, 9, dtype=torch.bool), 2.0
    dropout.preferred[0, [1, 4, 8]] = True
    kept = dropout(tokens)
    assert kept.shape == (1, 7, 2) and dropout.kept is not None and {1, 4, 8} <= set(dropout.kept[0].tolist())
    assert kept[0, 1:, 0].tolist() == [position + 1 for position in dropout.kept[0].tolist()]
    assert dropout.eval()(tokens) is tokens


def test_texts_in_buckets_are_encoded_as_open_clip_does():
    torch.manual_seed(0)
    model = new_clip(90).eval()
    tokens = torch.zeros(7, 24, dtype=torch.int64)
    for row, length in enumerate((3, 20, 5, 22, 4, 9, 12)):
        tokens[row, :length] = torch.randint(1, 88, (length,))
        tokens[row, length] = 89
    with torch.no_grad():
        torch.testing.assert_close(encode_short(model, tokens), model.encode_text(tokens), atol=1e-5, rtol=1e-4)


def tiny(steps: int) -> ClipTraining:
    return ClipTraining(steps=steps, batch_size=8, warmup=2, checkpoint_every=2, cooldown=0.01)


def train(folder: Path, steps: int) -> dict:
    folder.mkdir(exist_ok=True)
    return train_clip(square_scenes(40, seed=1), {"check": square_scenes(24, seed=2)}, folder, tiny(steps))


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4)
    assert whole["figures"] == parts["figures"]
    states = [torch.load(tmp_path / name / "clip.pt", weights_only=True) for name in ("whole", "parts")]
    for name, value in states[0]["raw"].items():
        assert torch.equal(value, states[1]["raw"][name]), name


def test_figures_are_shares_and_the_folder_loads_in_open_clip(tmp_path):
    import open_clip

    figures = train(tmp_path / "one", 2)["figures"]["check"]
    assert set(figures) == {"r1", "r1_exact", "noun", "patch"} and all(0 <= value <= 1 for value in figures.values())
    source = f"local-dir:{tmp_path / 'one' / 'clip'}"
    model, tokenise = open_clip.create_model(source).eval(), open_clip.get_tokenizer(source)
    assert measure(model, tokenise, square_scenes(24, seed=2)) == figures


def test_a_training_can_begin_with_the_weights_of_an_earlier_one(tmp_path):
    from transformers import AutoTokenizer

    train(tmp_path / "earlier", 2)
    folder = tmp_path / "earlier" / "clip"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = new_clip(len(tokenizer))
    copy_weights(folder, model, tokenizer)
    earlier = torch.load(tmp_path / "earlier" / "clip.pt", weights_only=True)["model"]
    assert all(torch.equal(value, earlier[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path)
    save_file({"token_embedding.weight": torch.zeros(4, 2)}, tmp_path / "open_clip_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no earlier embedded CLIP"):
        copy_weights(tmp_path, new_clip(len(tokenizer)), tokenizer)
