"""Read published pickles of numbers without being able to run anything.

A pickle is a program: it names functions and calls them. This reader looks no name up. It knows a short list of
names that arrays and tensors need and answers each with code of its own, which checks its arguments and builds the
value from raw bytes; any other name is refused before anything is called. Not even NumPy's and PyTorch's own
helpers are used, because NumPy believes a pickle that calls raw bytes objects, and PyTorch's `_load_from_bytes`
unpickles again, unrestricted.

Nor can a small pickle cost much time or memory: what it refers to twice is built once, what it copies, or means when it
is written out, is counted against its own size, and keys are flat and of few numbers: hashing nested tuples that share
their parts takes exponential time, and keys with equal hashes take quadratic time.

What can be read: None, bool, int, float, complex, str, bytes, list, tuple, dict, set; NumPy arrays and scalars of
booleans, numbers and strings, and object arrays of readable values; dense torch tensors, from any device, onto the
CPU.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pcm.errors import InputError, one_line
from pcm.safe_pickle.torch_files import load_torch
from pcm.safe_pickle.values import (
    AllowedCallable,
    Array,
    ArrayResolver,
    DType,
    as_key,
    as_pairs,
    latin1_bytes,
    make_array,
    make_complex,
    make_dict,
    make_scalar,
    make_size,
    make_tensor,
    no_bytes,
    set_of,
)

_TORCH_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C

#: A pickle may have so many times its own bytes read again or copied, or mean so many values, and some more where it is
#: small.
_COPIES = 6
_FREE_BYTES = 1 << 20


def load(source: str | Path | bytes, *, name: str | None = None) -> Any:
    """The value in a pickle (a path or its bytes), or in a file of `torch.save`; `name` is what errors call it.

    Raises InputError: it names something else than arrays and tensors need (the message says what), or is damaged.
    """
    name = name or ("pickle" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    if data.startswith(b"PK\x03\x04"):
        return _torch_archive(data, name)
    try:
        limit = _COPIES * len(data) + _FREE_BYTES
        value = ArrayResolver(limit=limit)(_Unpickler(io.BytesIO(data), budget=limit).load())
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # nothing but this reader runs, so whatever it trips over is the pickle's fault
        raise InputError(
            f"{name}: not a readable pickle ({type(error).__name__}: {one_line(error, longest=200)})"
        ) from error
    return _torch_archive(data, name) if isinstance(value, int) and value == _LEGACY_TORCH_MAGIC else value


def _torch_archive(data: bytes, name: str) -> Any:
    """A whole file written by torch.save: PyTorch's own restricted reader."""
    try:
        return load_torch(io.BytesIO(data))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (
            f"refused: it names {refused[1]}"
            if refused
            else f"not a readable torch file ({one_line(error, longest=200)})"
        )
        raise InputError(f"{name}: {why}") from error


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's own unpickler, the one written in Python, with fewer operations.

    The one written in C trusts the sizes in a pickle: one damaged byte makes it fill gigabytes with an empty table. So
    does this one for a bytearray's.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = {
        code: operation
        for code, operation in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        # Nothing that may be read makes an object of a class.
        if code not in b"".join((pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST))
    }

    def __init__(self, stream: io.BytesIO, *, budget: int):
        super().__init__(stream, encoding="latin1")  # pickles of Python 2 hold bytes where we expect names
        self._budget = budget

    def find_class(self, module: str, name: str) -> Any:
        answer = _ANSWERS.get((module.replace("numpy.core.", "numpy._core."), name))
        if answer is None:
            named = f"{module}.{name}"[:200].encode("unicode_escape").decode()
            raise InputError(
                f"refused: the pickle names {named}, which arrays and tensors do not need; nothing was executed"
            )
        return answer

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError("it names something by a number")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (Array, DType)):
            raise pickle.UnpicklingError("it sets the state of something else than an array")
        self.stack[-1].set_state(state)
        self._charge(self.stack[-1])

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, AllowedCallable) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("it calls what is no function")
        if function.copies:
            for argument in args:
                self._charge(argument)
        self.stack[-1] = result = function(*args)
        if function.copies:
            self._charge(result)

    def _charge(self, value: Any) -> None:
        if isinstance(value, Array):
            value = value.items or value.array
        if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
            self._budget -= value.nbytes
        elif isinstance(value, (str, bytes, bytearray, list, tuple, set, frozenset, dict)):
            self._budget -= len(value)
        if self._budget < 0:
            raise pickle.UnpicklingError("it copies more than it holds")

    # Python's own take any object that has the method, or can be an index.

    def load_append(self) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._top(list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[as_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._top(dict).update(as_pairs(items))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._top(set).update(map(as_key, items))

    def load_dict(self) -> None:
        items = self.pop_mark()  # first: it changes what `append` is
        self.append(dict(as_pairs(items)))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(as_key, items)))

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"it fills something else than a {kind.__name__}")
        return self.stack[-1]

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.FROZENSET[0]] = load_frozenset


class _StorageUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def _storage(data: Any) -> torch.Tensor:
    """A tensor's storage, (numel,), from the bytes that `torch.save(storage)` writes inside a plain pickle.

    They are five pickles (magic number, version, system, what the storage is, its keys), then its size and its bytes.
    """
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a torch storage of what are no bytes")
    stream = io.BytesIO(data)
    magic, _, _, pid, keys = [_StorageUnpickler(stream, budget=0).load() for _ in range(5)]  # they copy nothing
    known = isinstance(magic, int) and isinstance(pid, tuple) and isinstance(keys, list) and len(pid) > 1
    if not known or magic != _LEGACY_TORCH_MAGIC or not isinstance(pid[1], torch.dtype) or len(keys) != 1:
        raise pickle.UnpicklingError("a torch storage of an unknown form")
    size = int.from_bytes(stream.read(8), "little")
    raw = stream.read()
    if size * pid[1].itemsize != len(raw):
        raise pickle.UnpicklingError("a torch storage cut short")
    return torch.frombuffer(bytearray(raw), dtype=pid[1]) if size else torch.empty(0, dtype=pid[1])


_ANSWERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): AllowedCallable(DType),
    ("numpy", "ndarray"): AllowedCallable(Array),
    ("numpy._core.multiarray", "_reconstruct"): AllowedCallable(Array),
    ("numpy._core.multiarray", "scalar"): AllowedCallable(make_scalar),
    ("numpy._core.numeric", "_frombuffer"): AllowedCallable(make_array),
    ("_codecs", "encode"): AllowedCallable(latin1_bytes),
    ("torch._utils", "_rebuild_tensor_v2"): AllowedCallable(make_tensor, copies=False),
    ("torch._utils", "_rebuild_parameter"): AllowedCallable(lambda data, *ignored: data, copies=False),
    ("torch.storage", "_load_from_bytes"): AllowedCallable(_storage),
    ("torch", "Size"): AllowedCallable(make_size),
    # A plain dict: nothing read here depends on the difference.
    ("collections", "OrderedDict"): AllowedCallable(make_dict),
    **{(module, name): AllowedCallable(kind) for module in ("builtins", "__builtin__")
       for name, kind in (("set", set_of(set)), ("frozenset", set_of(frozenset)), ("complex", make_complex),
                          ("bytes", no_bytes))},
    **{("torch", name): dtype for name, dtype in _TORCH_DTYPES.items()},
}  # fmt: skip
