"""Text encoders that do not compute twice what they have computed.

Encoding is a function of token ids. Two ways to remember it, both on the encoder's own forward, so that they work for
every pipeline and for pipelines with several encoders:

- Whole batches (always on): the unconditional prompt of classifier-free guidance is the same batch at every call, so
  half of the encoding is done once in a worker's life. The output is the one of the same call, byte for byte.
- Each prompt alone (`GeneratorSpec.prompt_cache`): every distinct prompt is encoded in a batch of one and kept, so a
  caption with N pictures is encoded once. A batch of one rounds differently from a batch of eight, and which slot a
  repeated caption had first would decide its bytes if rows of full batches were kept: so it is another spec, and the
  embedding depends on the prompt alone. Without repeats it is slower: one prompt at a time.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import transformers
from transformers.utils import ModelOutput

#: Encoders whose output depends on nothing but their arguments, and whose pipelines leave it unchanged.
PURE_ENCODERS = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel)
#: Memory for embeddings of single prompts, bytes an encoder: about 2,000 prompts of Stable Diffusion 1.5 in half
#: precision. Repeats of a caption lie side by side in the plan, so more would not be hit more often.
MAX_BYTES = 256 * 2**20
#: Whole batches kept: the unconditional one, and the last other one, which pushes out its predecessor.
MAX_BATCHES = 2


def cache_prompts(pipeline: Any, *, each_alone: bool) -> None:
    """Give every pure text encoder of a pipeline a memory. Weights must not change afterwards."""
    for name, module in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(module, PURE_ENCODERS):
            memory = _EachAlone(module.forward) if each_alone else _WholeBatches(module.forward)
            setattr(module, "forward", memory)  # noqa: B010  # nn.Module calls the attribute of the instance


class _WholeBatches:
    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._known: OrderedDict[tuple, Any] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs)
        if key not in self._known:
            self._known[key] = self._encode(*args, **kwargs)
        self._known.move_to_end(key)
        while len(self._known) > MAX_BATCHES:
            self._known.popitem(last=False)
        return self._known[key]


class _EachAlone:
    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._known: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for row in range(len(input_ids)):
            alone = [_row(value, row, len(input_ids)) for value in (input_ids, *args)]
            named = {name: _row(value, row, len(input_ids)) for name, value in kwargs.items()}
            outputs.append(self._one(alone, named))
        return _concatenated(outputs)

    def _one(self, args: list, kwargs: dict) -> Any:
        key = _key(args, kwargs)
        if key not in self._known:
            output = self._encode(*args, **kwargs)
            size = sum(tensor.nbytes for tensor in _tensors(output))
            self._known[key] = (output, size)
            self._bytes += size
        self._known.move_to_end(key)
        while self._bytes > MAX_BYTES and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1][1]
        return self._known[key][0]


def _key(args: Any, kwargs: dict) -> tuple:
    return tuple(_frozen(value) for value in args), tuple((name, _frozen(kwargs[name])) for name in sorted(kwargs))


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().cpu().numpy().tobytes()
    return value


def _row(value: Any, row: int, rows: int) -> Any:
    return value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, ModelOutput) else output
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


def _concatenated(outputs: list[Any]) -> Any:
    """Encoder outputs of one prompt each, as the output of a batch; (1, ...) tensors become (B, ...)."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, ModelOutput):
        return type(first)(**{name: _concatenated([output[name] for output in outputs]) for name in first})
    return tuple(_concatenated(list(parts)) for parts in zip(*outputs, strict=True))
