"""The stages of making the embedded world: what a run finds that an earlier one left."""

import pytest

from tests.helpers.tiny_scenes import square_scenes


def test_training_sets_of_another_size_are_refused(tmp_path, call_job, monkeypatch):
    monkeypatch.setattr("pcm.embedded.making.art.fetch_art", lambda folder: pytest.fail("the drawings were fetched"))
    drawn = tmp_path / "data" / "clip_train.npz"
    drawn.parent.mkdir()
    square_scenes(20, seed=0).save(drawn)
    ended = call_job("pretrain_embedded", "--out", tmp_path, "--stage", "art", "--scenes", 600)
    assert ended.returncode == 2 and ended.stderr.startswith(
        f"error: --scenes 600: {drawn} holds 20 pictures, and would hold 600; give the --scenes that it was drawn with"
    )
