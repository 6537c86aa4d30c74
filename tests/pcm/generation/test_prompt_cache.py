"""A text encoder that remembers gives what it gave before, and is asked less often."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pcm.generation import prompt_cache
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Drawing, Request
from pcm.generation.pipeline_call import call_pipeline
from pcm.generation.pipeline_loading import load_pipeline
from pcm.generation.prompt_cache import cache_prompts
from tests.pcm.generation.test_diffusers_pipeline import spec_of
from tests.pcm.generation.test_pipeline_loading import offloaded

CAPTIONS = ["a cat", "a cat", "a dog", "two cows", "a cat", "a dog", "rain", "a red bus", "rain"]
REQUESTS = [Request(position=index, caption=text, seed=100 + index) for index, text in enumerate(CAPTIONS)]


def counted_shapes(generator: DiffusersTextToImage) -> list[tuple[int, ...]]:
    """The shapes that the encoder proper is given from now on."""
    shapes: list[tuple[int, ...]] = []
    encoder = generator._pipeline.text_encoder
    encoder.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)), with_kwargs=True
    )
    return shapes


@pytest.fixture(scope="module")
def make(tiny_t2i: Path) -> Callable[..., DiffusersTextToImage]:
    return lambda **values: DiffusersTextToImage(spec_of(tiny_t2i, batch_size=3, **values))


@pytest.fixture(scope="module")
def drawn_without_memory(tiny_t2i: Path) -> list[Drawing]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_cache, "PURE_ENCODERS", ())
        generator = DiffusersTextToImage(spec_of(tiny_t2i, batch_size=3))
    shapes = counted_shapes(generator)
    drawn = generator.draw(REQUESTS)
    assert len(shapes) == 6, "three batches, each with its unconditional one"
    return drawn


def test_the_unconditional_batch_is_encoded_once_and_no_byte_changes(
    make: Callable[..., DiffusersTextToImage], drawn_without_memory: list[Drawing]
) -> None:
    generator = make()
    shapes = counted_shapes(generator)
    assert generator.draw(REQUESTS) == drawn_without_memory
    assert [shape[0] for shape in shapes] == [3, 3, 3], "three batches; the empty prompts are known since loading"
    assert generator.draw(REQUESTS[::-1]) == drawn_without_memory[::-1]


def test_a_negative_prompt_is_encoded_once_too(make: Callable[..., DiffusersTextToImage]) -> None:
    generator = make(negative_prompt="blurry")
    shapes = counted_shapes(generator)
    generator.draw(REQUESTS)
    assert len(shapes) == 3, "the negative prompts are known since the test at loading"


def test_each_distinct_prompt_is_encoded_alone_and_once(make: Callable[..., DiffusersTextToImage]) -> None:
    generator = make(prompt_cache=True)
    shapes = counted_shapes(generator)
    drawn = generator.draw(REQUESTS)
    distinct = len(set(CAPTIONS))  # the empty one is known since the test at loading
    assert [shape[0] for shape in shapes] == [1] * distinct
    for request, drawing in zip(REQUESTS, drawn, strict=True):
        assert make(prompt_cache=True).draw([request]) == [drawing], "alone, in a process that remembers nothing"


@pytest.mark.parametrize("each_alone", [False, True])
def test_a_model_that_waits_for_its_turn_remembers_from_call_to_call(
    each_alone: bool, tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = spec_of(tiny_t2i, batch_size=3, prompt_cache=each_alone)
    expected, _ = call_pipeline(load_pipeline(plain), plain, CAPTIONS[:3], range(3))
    pipeline = offloaded(tiny_t2i, monkeypatch, offload="model", prompt_cache=each_alone)
    encoded: list[int] = []
    pipeline.text_encoder.embeddings.register_forward_pre_hook(lambda *_: encoded.append(1))
    first, _ = call_pipeline(pipeline, plain, CAPTIONS[:3], range(3))
    before = len(encoded)
    again, _ = call_pipeline(pipeline, plain, CAPTIONS[:3], range(3))
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert before > 0 and len(encoded) == before, "nothing is encoded a second time"


def test_a_model_whose_layers_wait_for_their_turn_remembers_too(
    tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = offloaded(tiny_t2i, monkeypatch, offload="sequential", prompt_cache=True).text_encoder
    assert isinstance(encoder._old_forward, prompt_cache._EachAlone), "what the offload calls, and puts back"


def test_memory_is_bounded_and_forgetting_changes_nothing(
    make: Callable[..., DiffusersTextToImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(prompt_cache=True).draw(REQUESTS)
    generator = make(prompt_cache=True)
    memory = generator._pipeline.text_encoder.forward
    monkeypatch.setattr(prompt_cache, "MAX_BYTES", 30_000)  # three prompts of 77 x 32 floats
    assert generator.draw(REQUESTS) == expected
    assert 0 < memory._bytes <= 30_000


def test_outputs_with_every_kind_of_field_are_put_together(tiny_t2i: Path) -> None:
    pipeline = load_pipeline(spec_of(tiny_t2i))
    encoder = pipeline.text_encoder
    ids = pipeline.tokenizer(CAPTIONS[:3], padding="max_length", max_length=77, return_tensors="pt").input_ids
    arguments = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    with torch.no_grad():
        together = encoder(ids, **arguments)
        cache_prompts(pipeline, each_alone=True)
        alone = encoder(ids, **arguments)
    assert type(alone) is type(together) and list(alone) == list(together)
    torch.testing.assert_close(alone.last_hidden_state, together.last_hidden_state)
    torch.testing.assert_close(alone[1], together[1])
    for one, two in zip(alone.hidden_states, together.hidden_states, strict=True):
        torch.testing.assert_close(one, two)
