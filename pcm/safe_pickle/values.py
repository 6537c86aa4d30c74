"""What a pickle of numbers may be made of, built by code of our own from checked arguments and raw bytes.

Used by `pcm.safe_pickle.reader` alone. Whatever does not fit raises pickle.UnpicklingError.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

_ALLOWED_DTYPE = re.compile(r"[<>|=]?(?:b1|\?|[iu][1248]|f[248]|c(?:8|16)|[SU]\d+)")
_MAX_DIMENSIONS = 64
_SCALARS = (str, bytes, int, float, complex, type(None), np.generic)
_MAX_KEY = 1 << 60  # beyond it, integers with the same hash are easy to find


def as_key(value: Any) -> Any:
    """A key or member as it is. Raises for all but scalars and short tuples of text with at most one number.

    Those are hashed in no time, and few have the same hash: Python's hashes of text are secret, and those of numbers
    differ. A pair of numbers, or a complex number, can be computed for any hash, and a dict of 20,000 such keys takes
    minutes.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a key of many parts")
    for part in parts:
        if not isinstance(part, _SCALARS) or (isinstance(part, int) and abs(part) >= _MAX_KEY):
            raise pickle.UnpicklingError("a key that is neither text nor a number")
        if isinstance(part, (complex, np.complexfloating)):
            raise pickle.UnpicklingError("a key that is a complex number")
    if sum(not isinstance(part, (str, bytes)) for part in parts) > 1:
        raise pickle.UnpicklingError("a key of several numbers")
    return value


def as_pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(map(as_key, items[0::2]), items[1::2], strict=True))


class AllowedCallable:
    """What a name in a pickle stands for: it can be called, and nothing else. copies: its result takes memory."""

    __slots__ = ("_function", "copies")

    def __init__(self, function: Callable[..., Any], *, copies: bool = True):
        self._function = function
        self.copies = copies

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class DType:
    """A NumPy dtype in the making. Only the byte order is taken from its state: the flags there cannot be trusted."""

    __slots__ = ("dtype",)

    def __init__(self, spec: Any, align: Any = False, copy: Any = False):
        if isinstance(spec, str) and re.fullmatch(r"[|]?O8?", spec):
            self.dtype = np.dtype(object)
        elif isinstance(spec, str) and _ALLOWED_DTYPE.fullmatch(spec):
            self.dtype = np.dtype(spec)
        else:
            # Only text is shown: to write a nested tuple out can take for ever.
            shown = repr(spec[:40]) if isinstance(spec, str) else type(spec).__name__
            raise pickle.UnpicklingError(f"dtype {shown} is not one of booleans, numbers or strings")

    def set_state(self, state: Any) -> None:
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured dtypes are not read")
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array in the making; `ArrayResolver` puts the array in its place, and an object array's items in it."""

    __slots__ = ("array", "items")

    def __init__(self, *ignored: Any):
        self.array: np.ndarray | None = None
        self.items: list[Any] | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        if isinstance(dtype, DType) and dtype.dtype == object:
            self.array, self.items = _object_array(data, shape, order), data
        else:
            self.array = make_array(data, dtype, shape, order)


def make_array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, DType) or not _are_sizes(shape) or dtype.dtype == object:
        raise pickle.UnpicklingError("an array without a shape or dtype")
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _object_array(data: Any, shape: Any, order: str) -> np.ndarray:
    """An array for the items of `data`, still empty: what they refer to may not be read yet."""
    if not _are_sizes(shape) or not isinstance(data, list) or len(data) != math.prod(shape):
        raise pickle.UnpicklingError("an object array whose items are no list of its size")
    return np.empty(len(data), object).reshape(shape, order="F" if order == "F" else "C")


def make_scalar(dtype: Any, data: Any) -> Any:
    return make_array(data, dtype, ())[()]


def set_of(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple)):
            raise pickle.UnpicklingError("a set of what is no list")
        return kind(map(as_key, items))

    return make


def make_dict(pairs: Any = ()) -> dict:
    """Python 2 writes an OrderedDict as a list of its pairs."""
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise pickle.UnpicklingError("a dict of what are no pairs")
    return {as_key(key): value for key, value in pairs}


def make_size(sizes: Any = ()) -> tuple:
    if not _are_sizes(sizes):
        raise pickle.UnpicklingError("a size of what are no sizes")
    return sizes


def make_complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise pickle.UnpicklingError("a complex number of what are no numbers")
    return complex(real, imaginary)


def latin1_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Python 3 writes bytes so in old pickle protocols: `_codecs.encode(text, "latin1")`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text to encode otherwise than as latin1")
    return text.encode("latin1")


def no_bytes(*args: Any) -> bytes:
    """Python 3 writes b"" in old protocols as a call of `bytes` without arguments."""
    if args:
        raise pickle.UnpicklingError("bytes made from something else")
    return b""


def make_tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> torch.Tensor:
    """A view, so that a thousand tensors of one storage take no more memory than it."""
    sizes = _are_sizes((offset,)) and _are_sizes(size) and _are_sizes(stride)
    if not isinstance(storage, torch.Tensor) or not sizes or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return storage.as_strided(size, stride, offset) if math.prod(size) else storage.new_empty(size)


def _are_sizes(sizes: Any) -> bool:
    known = isinstance(sizes, tuple) and len(sizes) <= _MAX_DIMENSIONS
    return known and all(isinstance(n, int) and 0 <= n < 2**48 for n in sizes)


class ArrayResolver:
    """Replaces every `Array` by its array, in lists, tuples and dicts, however deep; what is shared stays shared.

    What is shared counts each time towards `limit`, the values that the whole may mean when it is written out: whoever
    reads it goes through all of them.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._done: dict[int, Any] = {}
        self._meaning: dict[int, int] = {}  # values that it means, written out
        self._begun: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (AllowedCallable, DType, torch.dtype)):
            raise pickle.UnpicklingError("a function or a dtype where a value should be")
        if not isinstance(value, (Array, list, tuple, dict)):
            return value
        if id(value) not in self._done:
            if id(value) in self._begun:
                raise pickle.UnpicklingError("a container that holds itself")
            self._begun.add(id(value))
            self._done[id(value)] = self._finish(value)
        return self._done[id(value)]

    def _finish(self, value: Any) -> Any:
        if isinstance(value, Array):
            return self._array(value)
        items = value.values() if isinstance(value, dict) else value
        finished = [self(item) for item in items]
        self._count(value, items)
        return dict(zip(value, finished, strict=True)) if isinstance(value, dict) else type(value)(finished)

    def _array(self, value: Array) -> np.ndarray:
        if value.array is None:
            raise pickle.UnpicklingError("an array without contents")
        if value.items is None:
            self._meaning[id(value)] = value.array.size
            return value.array
        items = np.empty(len(value.items), object)
        for position, item in enumerate(value.items):
            items[position] = self(item)
        self._count(value, value.items)
        value.array[...] = items.reshape(value.array.shape, order="F" if value.array.flags.fnc else "C")
        return value.array

    def _count(self, value: Any, items: Iterable[Any]) -> None:
        meaning = sum(self._meaning.get(id(item), 1) for item in items)
        if meaning > self._limit:
            raise pickle.UnpicklingError("it means many more values than it holds: it repeats some without end")
        self._meaning[id(value)] = meaning
