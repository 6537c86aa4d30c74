"""Pictures are checked and encoded while the next batch is drawn, and never many batches behind."""

import threading
from pathlib import Path

import pytest

from pcm.generation import diffusers_pipeline as diffusers_generator
from pcm.generation.diffusers_pipeline import BATCHES_ENCODED_AT_ONCE, DiffusersTextToImage
from pcm.generation.drawing import Request
from pcm.images import encode_image
from tests.pcm.generation.test_diffusers_pipeline import spec_of

REQUESTS = [Request(position=index, caption="a cat", seed=index) for index in range(7)]


@pytest.fixture
def generator(tiny_t2i: Path) -> DiffusersTextToImage:
    return DiffusersTextToImage(spec_of(tiny_t2i, batch_size=1))


class Batches:
    """Counts the batches that a pipeline has begun."""

    def __init__(self, generator: DiffusersTextToImage) -> None:
        self.begun = 0
        self.changed = threading.Condition()
        generator._pipeline.unet.register_forward_pre_hook(self._step)
        self._steps = 0

    def _step(self, *_: object) -> None:
        with self.changed:
            self._steps += 1
            self.begun = (self._steps + 1) // 2  # two denoising steps a batch
            self.changed.notify_all()


def test_a_batch_is_encoded_while_the_next_one_is_drawn(
    generator: DiffusersTextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generator.draw(REQUESTS)
    batches = Batches(generator)
    overlapped = []

    def encode(*args: object, **kwargs: object) -> bytes:
        with batches.changed:  # the first picture is not encoded before the second batch has begun
            overlapped.append(batches.changed.wait_for(lambda: batches.begun >= 2, timeout=30))
        return encode_image(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(diffusers_generator, "encode_image", encode)
    assert generator.draw(REQUESTS) == expected, "order and bytes are the same"
    assert all(overlapped)


def test_drawing_waits_for_encoding_that_falls_behind(
    generator: DiffusersTextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, release, behind = Batches(generator), threading.Event(), []

    def encode(*args: object, **kwargs: object) -> bytes:
        release.wait(timeout=30)
        return encode_image(*args, **kwargs)  # type: ignore[arg-type]

    def look() -> None:
        with batches.changed:
            batches.changed.wait_for(lambda: batches.begun > BATCHES_ENCODED_AT_ONCE, timeout=30)
            batches.changed.wait_for(lambda: batches.begun > BATCHES_ENCODED_AT_ONCE + 1, timeout=1)
            behind.append(batches.begun)
        release.set()

    monkeypatch.setattr(diffusers_generator, "encode_image", encode)
    watcher = threading.Thread(target=look)
    watcher.start()
    assert len(generator.draw(REQUESTS)) == len(REQUESTS)
    watcher.join()
    assert behind == [BATCHES_ENCODED_AT_ONCE + 1]
