"""What one caption, or too little memory, does to a generator is done to no other caption."""

from pathlib import Path

import pytest
import torch

from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Drawing, Guard, Request
from pcm.generation.isolation import IsolatedDrawing
from pcm.model_faults import is_out_of_memory, is_sticky
from pcm.spec import GeneratorSpec
from tests.helpers.faulty_generators import BREAKS, NEEDS_MEMORY, NEEDS_TOO_MUCH, RAISES
from tests.helpers.faulty_pipeline import FaultyTextToImage

GOOD = [f"a {colour} bus" for colour in ("red", "blue", "green", "old", "new", "long", "wet")]


def requests_of(captions: list[str]) -> list[Request]:
    return [Request(position=index, caption=caption, seed=100 + index) for index, caption in enumerate(captions)]


def spec_of(folder: Path, *, batch_size: int = 4) -> GeneratorSpec:
    return GeneratorSpec(
        model=str(folder), revision="test", num_inference_steps=1, guidance_scale=2.0, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_t2i: Path) -> DiffusersTextToImage:
    return DiffusersTextToImage(spec_of(tiny_t2i))


class Recorder(Guard):
    """A guard that remembers what it was told."""

    def __init__(self, *, suspicions: dict[int, int] | None = None, refusals: dict[int, str] | None = None) -> None:
        self.batches: list[list[int]] = []
        self.failures: list[tuple[list[int], str, str]] = []
        self._suspicions = suspicions or {}
        self._refusals = refusals or {}

    def drawing(self, requests, batch_size):
        self.batches.append([request.position for request in requests])
        return super().drawing(requests, batch_size)

    def suspicion(self, request):
        return self._suspicions.get(request.position, 0)

    def refusal(self, request):
        return self._refusals.get(request.position, "")

    def failed(self, requests, reason, error):
        self.failures.append(([request.position for request in requests], reason, error))


def test_a_caption_that_raises_is_refused_and_its_neighbours_are_drawn(
    tiny_t2i: Path, undisturbed: DiffusersTextToImage
) -> None:
    requests = requests_of([*GOOD[:2], RAISES, *GOOD[2:]])
    guard = Recorder()
    drawings = FaultyTextToImage(spec_of(tiny_t2i)).draw(requests, guard)
    assert drawings[2] == Drawing(b"", 0, 0, 102, 0, 4, "generator_error")
    others = [request for request in requests if request.caption != RAISES]
    assert [drawings[request.position] for request in others] == undisturbed.draw(others), "byte for byte"
    assert guard.failures == [([2], "generator_error", "ValueError: no such colour")]
    assert guard.batches == [[0, 1, 2, 3], [0], [1], [2], [], [3], [4, 5, 6, 7]], "alone, and once with nobody"


def test_too_little_memory_halves_the_batch_for_good_and_the_rows_say_so(
    tiny_t2i: Path, undisturbed: DiffusersTextToImage, caplog: pytest.LogCaptureFixture
) -> None:
    requests = requests_of([*GOOD[:5], NEEDS_MEMORY, *GOOD[5:]])
    generator = FaultyTextToImage(spec_of(tiny_t2i))
    drawings = generator.draw(requests)
    assert [drawing.batch_size for drawing in drawings] == [4, 4, 4, 4, 2, 2, 2, 2]
    assert not any(drawing.reason for drawing in drawings)
    assert drawings[:4] == undisturbed.draw(requests[:4])
    halved = DiffusersTextToImage(spec_of(tiny_t2i, batch_size=2))
    assert drawings[4:] == halved.draw(requests)[4:]
    assert generator.draw(requests[:4]) == halved.draw(requests[:4]), "the next shard too"
    said = [record for record in caplog.records if "at once from now on" in record.message]
    assert len(said) == 1 and "allocate memory" in said[0].message


def test_a_caption_too_large_even_alone_is_refused(tiny_t2i: Path) -> None:
    guard = Recorder()
    drawings = FaultyTextToImage(spec_of(tiny_t2i)).draw(requests_of([GOOD[0], NEEDS_TOO_MUCH, GOOD[1]]), guard)
    assert [drawing.reason for drawing in drawings] == ["", "out_of_memory", ""]
    assert [drawing.batch_size for drawing in drawings] == [1, 1, 1]
    assert [failure[:2] for failure in guard.failures] == [([1], "out_of_memory")]


def test_suspects_are_drawn_alone_and_first_and_the_refused_not_at_all(
    tiny_t2i: Path, undisturbed: DiffusersTextToImage
) -> None:
    requests = requests_of(GOOD)
    guard = Recorder(suspicions={1: 2, 2: 1, 5: 3}, refusals={5: "generator_hung"})
    drawings = FaultyTextToImage(spec_of(tiny_t2i)).draw(requests, guard)
    assert guard.batches == [[2], [1], [0, 3, 6], [4]]
    assert drawings[5] == Drawing(b"", 0, 0, 105, 0, 4, "generator_hung")
    assert drawings[:5] == undisturbed.draw(requests)[:5]


@pytest.mark.parametrize("positions", [[4, 5, 6, 7], [5, 6], [6], [9, 2, 6]])
def test_a_request_always_has_the_same_slot_whoever_is_beside_it(positions: list[int]) -> None:
    """Kernels may round the rows of a batch differently, on some machines: so the slots themselves are looked at."""
    seen = {}

    def draw_batch(slots: dict[int, Request], batch_size: int) -> list[Drawing]:
        seen.update({request.position: (slot, batch_size) for slot, request in slots.items()})
        return [Drawing(b"x", 1, 1, request.seed, 1, batch_size) for request in slots.values()]

    requests = [Request(position=position, caption=GOOD[0], seed=0) for position in positions]
    IsolatedDrawing(draw_batch, batch_size=4, max_attempts=1).draw(requests)
    assert seen == {position: (position % 4, 4) for position in positions}


def test_a_picture_that_cannot_be_encoded_is_refused_alone(
    tiny_t2i: Path, undisturbed: DiffusersTextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: DiffusersTextToImage, pixels, flagged, request, batch_size):
        return original(self, pixels[:, :, :1] if request.position == 1 else pixels, flagged, request, batch_size)

    original = DiffusersTextToImage._drawing
    requests = requests_of(GOOD[:4])
    whole = undisturbed.draw(requests)
    monkeypatch.setattr(DiffusersTextToImage, "_drawing", encode)
    drawings = FaultyTextToImage(spec_of(tiny_t2i)).draw(requests)
    assert drawings[1].reason == "generator_error"
    assert [drawings[index] for index in (0, 2, 3)] == [whole[index] for index in (0, 2, 3)]


def test_a_broken_device_refuses_no_caption(tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyTextToImage, "_broken", False)
    with pytest.raises(RuntimeError, match="device-side assert"):
        FaultyTextToImage(spec_of(tiny_t2i)).draw(requests_of([GOOD[0], BREAKS]))


def test_a_process_that_can_draw_nothing_any_more_refuses_no_caption(tiny_t2i: Path) -> None:
    """Nor does it need one of the errors that are known to be for good."""
    generator = DiffusersTextToImage(spec_of(tiny_t2i))
    generator._pipeline = None
    with pytest.raises(TypeError, match="not callable"):
        generator.draw(requests_of(GOOD[:2]))


def test_errors_are_told_apart() -> None:
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 50)
    for error in (
        allocation.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ):
        assert is_out_of_memory(error) and not is_sticky(error)
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert is_out_of_memory(RuntimeError(text)) and not is_sticky(RuntimeError(text))
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDNN_STATUS_EXECUTION_FAILED",
    ):
        assert is_sticky(RuntimeError(text)) and not is_out_of_memory(RuntimeError(text))
    for error in (ValueError("no such colour"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        assert not is_sticky(error) and not is_out_of_memory(error)
