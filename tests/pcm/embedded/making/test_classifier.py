"""The independent classifier: it learns, it resumes, and its shares count what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pcm.embedded.making import classifier
from pcm.embedded.making.classifier import ClassifierTraining, Verdict, train_classifier
from pcm.embedded.making.world import NOUNS, PLACES
from pcm.errors import InputError
from tests.helpers.tiny_scenes import SQUARES, square_scenes

SHORT = ClassifierTraining(steps=4, batch_size=8, checkpoint_every=2)


def test_shares_count_what_was_asked_for():
    scores = np.zeros((4, len(NOUNS)), np.float32)
    names = [noun.name for noun in NOUNS]
    scores[0, 2] = 0.9  # asked for 2: right
    scores[1, 2] = 0.9  # asked for 3: wrong
    scores[2, [4, 5]] = 0.3, 0.9  # asked for 4 and 5: both
    scores[3, [4, 6]] = 0.9, 0.3  # asked for 4 and 5: one of them
    asked = [[names[2]], [names[3]], [names[4], names[5]], [names[5], names[4]]]
    shares = classifier._shares(Verdict(scores, np.array([0, 0, 1, 1])), asked, np.array([0, 1, 1, 1]))
    assert shares == {"single": 0.5, "both": 0.5, "any": 1.0, "place": 0.75}


def test_it_learns_to_name_things_it_was_shown(tmp_path):
    figures = train_classifier(
        square_scenes(256, seed=1),
        square_scenes(64, seed=2),
        tmp_path,
        ClassifierTraining(steps=30, batch_size=12, rate=5e-3),
    )
    assert figures["single"] >= 0.6  # chance: 1 in 4 of the squares' nouns
    assert figures["place"] > 1.5 / len(PLACES)
    pictures = square_scenes(8, seed=3, things=1)
    asked = [[SQUARES[row[0]]] for row in pictures.nouns]
    assert classifier.recognised(tmp_path, pictures.images, asked, pictures.places)["single"] >= 0.5


def test_a_resumed_training_equals_an_undisturbed_one(tmp_path):
    data, check = square_scenes(32, seed=1), square_scenes(8, seed=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_classifier(data, check, whole, SHORT)
    _stopped_after(2, data, check, parts)
    train_classifier(data, check, parts, SHORT)
    first, second = (torch.load(folder / "judge.pt", weights_only=True)["model"] for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _stopped_after(steps: int, data, check, folder):
    """A run that dies after its checkpoint at `steps`."""

    class Killed(Exception):
        pass

    def die(path, state):
        torch.save(state, path)
        if state["step"] == steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(classifier, "save_state", die)
        train_classifier(data, check, folder, replace(SHORT))


def test_without_a_trained_classifier_one_line_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"judge\.pt not found.*--stage judge"):
        classifier.judge(tmp_path, np.zeros((1, 64, 64, 3), np.uint8))
