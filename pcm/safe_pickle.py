"""Read published pickles of numbers without being able to run anything.

A pickle is a program: it names functions and calls them. This reader looks no name up. It knows a short list of
names that arrays and tensors need and answers each with code of its own, which checks its arguments and builds the
value from raw bytes; any other name is refused before anything is called. Not even NumPy's and PyTorch's own
helpers are used, because NumPy believes a pickle that calls raw bytes objects, and PyTorch's `_load_from_bytes`
unpickles again, unrestricted.

Nor can a small pickle cost much time or memory: what it refers to twice is built once, what it copies is counted
against its own size, and keys are flat, because hashing nested tuples that share their parts takes exponential time.

What can be read: None, bool, int, float, complex, str, bytes, list, tuple, dict, set; NumPy arrays and scalars of
booleans, numbers and strings, and object arrays of readable values; dense torch tensors, from any device, onto the
CPU.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pcm.errors import InputError

_ALLOWED_DTYPE = re.compile(r"[<>|=]?(?:b1|\?|[iu][1248]|f[248]|c(?:8|16)|[SU]\d+)")
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

#: A pickle may have so many times its own bytes read again or copied, and some more where it is small.
_COPIES = 6
_FREE_BYTES = 1 << 20
_MAX_DIMENSIONS = 64
_SCALARS = (str, bytes, int, float, complex, type(None), np.generic)
_MAX_KEY = 1 << 60  # beyond it, integers with the same hash are easy to find


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
        value = _Finisher()(_Unpickler(io.BytesIO(data), budget=_COPIES * len(data) + _FREE_BYTES).load())
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # nothing but this reader runs, so whatever it trips over is the pickle's fault
        raise InputError(f"{name}: not a readable pickle ({type(error).__name__}: {_one_line(error)})") from error
    return _torch_archive(data, name) if isinstance(value, int) and value == _LEGACY_TORCH_MAGIC else value


def _torch_archive(data: bytes, name: str) -> Any:
    """A whole file written by torch.save: PyTorch's own restricted reader."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"refused: it names {refused[1]}" if refused else f"not a readable torch file ({_one_line(error)})"
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
        if not isinstance(self.stack[-1], (_Array, _DType)):
            raise pickle.UnpicklingError("it sets the state of something else than an array")
        self.stack[-1].set_state(state)
        self._charge(self.stack[-1])

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Answer) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("it calls what is no function")
        if function.copies:
            for argument in args:
                self._charge(argument)
        self.stack[-1] = result = function(*args)
        if function.copies:
            self._charge(result)

    def _charge(self, value: Any) -> None:
        if isinstance(value, _Array):
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
        self._top(dict)[_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._top(dict).update(_pairs(items))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._top(set).update(map(_key, items))

    def load_dict(self) -> None:
        items = self.pop_mark()  # first: it changes what `append` is
        self.append(dict(_pairs(items)))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

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


def _key(value: Any) -> Any:
    """A key or member as it is. Raises for all but scalars and tuples of them: those are hashed in no time."""
    for part in value if isinstance(value, tuple) else (value,):
        if not isinstance(part, _SCALARS) or (isinstance(part, int) and abs(part) >= _MAX_KEY):
            raise pickle.UnpicklingError("a key that is neither text nor a number")
    return value


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(map(_key, items[0::2]), items[1::2], strict=True))


class _Answer:
    """What a name in a pickle stands for: it can be called, and nothing else. copies: its result takes memory."""

    __slots__ = ("_function", "copies")

    def __init__(self, function: Callable[..., Any], *, copies: bool = True):
        self._function = function
        self.copies = copies

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _DType:
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


class _Array:
    """A NumPy array in the making; `_Finisher` puts the array in its place, and an object array's items in it."""

    __slots__ = ("array", "items")

    def __init__(self, *ignored: Any):
        self.array: np.ndarray | None = None
        self.items: list[Any] | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        if isinstance(dtype, _DType) and dtype.dtype == object:
            self.array, self.items = _object_array(data, shape, order), data
        else:
            self.array = _array(data, dtype, shape, order)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not _are_sizes(shape) or dtype.dtype == object:
        raise pickle.UnpicklingError("an array without a shape or dtype")
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _object_array(data: Any, shape: Any, order: str) -> np.ndarray:
    """An array for the items of `data`, still empty: what they refer to may not be read yet."""
    if not _are_sizes(shape) or not isinstance(data, list) or len(data) != math.prod(shape):
        raise pickle.UnpicklingError("an object array whose items are no list of its size")
    return np.empty(len(data), object).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ())[()]


def _set_of(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple)):
            raise pickle.UnpicklingError("a set of what is no list")
        return kind(map(_key, items))

    return make


def _dict_of(pairs: Any = ()) -> dict:
    """Python 2 writes an OrderedDict as a list of its pairs."""
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise pickle.UnpicklingError("a dict of what are no pairs")
    return {_key(key): value for key, value in pairs}


def _size_of(sizes: Any = ()) -> tuple:
    if not _are_sizes(sizes):
        raise pickle.UnpicklingError("a size of what are no sizes")
    return sizes


def _number(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise pickle.UnpicklingError("a complex number of what are no numbers")
    return complex(real, imaginary)


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """Python 3 writes bytes so in old pickle protocols: `_codecs.encode(text, "latin1")`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text to encode otherwise than as latin1")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    """Python 3 writes b"" in old protocols as a call of `bytes` without arguments."""
    if args:
        raise pickle.UnpicklingError("bytes made from something else")
    return b""


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
    magic, _, _, pid, keys = [_StorageUnpickler(stream, budget=_FREE_BYTES).load() for _ in range(5)]
    known = isinstance(magic, int) and isinstance(pid, tuple) and isinstance(keys, list) and len(pid) > 1
    if not known or magic != _LEGACY_TORCH_MAGIC or not isinstance(pid[1], torch.dtype) or len(keys) != 1:
        raise pickle.UnpicklingError("a torch storage of an unknown form")
    size = int.from_bytes(stream.read(8), "little")
    raw = stream.read()
    if size * pid[1].itemsize != len(raw):
        raise pickle.UnpicklingError("a torch storage cut short")
    return torch.frombuffer(bytearray(raw), dtype=pid[1]) if size else torch.empty(0, dtype=pid[1])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> torch.Tensor:
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


_ANSWERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Answer(_DType),
    ("numpy", "ndarray"): _Answer(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Answer(_Array),
    ("numpy._core.multiarray", "scalar"): _Answer(_scalar),
    ("numpy._core.numeric", "_frombuffer"): _Answer(_array),
    ("_codecs", "encode"): _Answer(_latin1),
    ("torch._utils", "_rebuild_tensor_v2"): _Answer(_tensor, copies=False),
    ("torch._utils", "_rebuild_parameter"): _Answer(lambda data, *ignored: data, copies=False),
    ("torch.storage", "_load_from_bytes"): _Answer(_storage),
    ("torch", "Size"): _Answer(_size_of),
    # A plain dict: nothing read here depends on the difference.
    ("collections", "OrderedDict"): _Answer(_dict_of),
    **{(module, name): _Answer(kind) for module in ("builtins", "__builtin__")
       for name, kind in (("set", _set_of(set)), ("frozenset", _set_of(frozenset)), ("complex", _number),
                          ("bytes", _no_bytes))},
    **{("torch", name): dtype for name, dtype in _TORCH_DTYPES.items()},
}  # fmt: skip


class _Finisher:
    """Replaces every `_Array` by its array, in lists, tuples and dicts, however deep; what is shared stays shared."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._begun: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (_Answer, _DType, torch.dtype)):
            raise pickle.UnpicklingError("a function or a dtype where a value should be")
        if not isinstance(value, (_Array, list, tuple, dict)):
            return value
        if id(value) not in self._done:
            if id(value) in self._begun:
                raise pickle.UnpicklingError("a container that holds itself")
            self._begun.add(id(value))
            self._done[id(value)] = self._finish(value)
        return self._done[id(value)]

    def _finish(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if not isinstance(value, _Array):
            return type(value)(self(item) for item in value)
        if value.array is None:
            raise pickle.UnpicklingError("an array without contents")
        if value.items is not None:
            items = np.empty(len(value.items), object)
            for position, item in enumerate(value.items):
                items[position] = self(item)
            value.array[...] = items.reshape(value.array.shape, order="F" if value.array.flags.fnc else "C")
        return value.array


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no detail"])[0][:200]
