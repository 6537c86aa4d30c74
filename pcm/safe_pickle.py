"""Read published pickles of numbers without being able to run anything.

A pickle is a program: it names functions and calls them. This reader looks no name up. It knows a short list of
names that arrays and tensors need and answers each with code of its own, which checks its arguments and builds the
value from raw bytes; any other name is refused before anything is called. Not even NumPy's and PyTorch's own
helpers are used, because NumPy believes a pickle that calls raw bytes objects, and PyTorch's `_load_from_bytes`
unpickles again, unrestricted.

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
        value = _finished(_Unpickler(io.BytesIO(data)).load())
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
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = {
        code: operation
        for code, operation in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        # Nothing that may be read makes an object of a class.
        if code not in b"".join((pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST))
    }

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")  # pickles of Python 2 hold bytes where we expect names

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

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Answer:
    """What a name in a pickle stands for: it can be called, and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

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
            raise pickle.UnpicklingError(f"dtype {str(spec)[:40]!r} is not one of booleans, numbers or strings")

    def set_state(self, state: Any) -> None:
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured dtypes are not read")
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array in the making; `_finished` puts the array itself in its place."""

    __slots__ = ("array",)

    def __init__(self, *ignored: Any):
        self.array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not _are_sizes(shape):
        raise pickle.UnpicklingError("an array without a shape or dtype")
    if dtype.dtype != object:
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C").copy(order="K")
    if not isinstance(data, list) or len(data) != math.prod(shape):
        raise pickle.UnpicklingError("an object array whose items are no list of its size")
    array = np.empty(len(data), object)
    array[:] = [_finished(item) for item in data]
    return array.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ())[()]


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
    stream = io.BytesIO(data)
    magic, _, _, pid, keys = [_StorageUnpickler(stream).load() for _ in range(5)]
    if magic != _LEGACY_TORCH_MAGIC or pid[0] != "storage" or not isinstance(pid[1], torch.dtype) or len(keys) != 1:
        raise pickle.UnpicklingError("a torch storage of an unknown form")
    size = int.from_bytes(stream.read(8), "little")
    raw = stream.read()
    if size * pid[1].itemsize != len(raw):
        raise pickle.UnpicklingError("a torch storage cut short")
    return torch.frombuffer(bytearray(raw), dtype=pid[1]) if size else torch.empty(0, dtype=pid[1])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor) or not _are_sizes((offset, *size, *stride)) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.numel():
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return (
        storage.as_strided(tuple(size), tuple(stride), offset).clone() if math.prod(size) else storage.new_empty(size)
    )


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, tuple) and all(isinstance(n, int) and 0 <= n < 2**48 for n in sizes)


_ANSWERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Answer(_DType),
    ("numpy", "ndarray"): _Answer(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Answer(_Array),
    ("numpy._core.multiarray", "scalar"): _Answer(_scalar),
    ("numpy._core.numeric", "_frombuffer"): _Answer(_array),
    ("_codecs", "encode"): _Answer(_latin1),
    ("torch._utils", "_rebuild_tensor_v2"): _Answer(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Answer(lambda data, *ignored: data),
    ("torch.storage", "_load_from_bytes"): _Answer(_storage),
    ("torch", "Size"): _Answer(tuple),
    # A plain dict: nothing read here depends on the difference.
    ("collections", "OrderedDict"): _Answer(dict),
    **{(module, name): _Answer(kind) for module in ("builtins", "__builtin__")
       for name, kind in (("set", set), ("frozenset", frozenset), ("complex", complex), ("bytes", _no_bytes))},
    **{("torch", name): dtype for name, dtype in _TORCH_DTYPES.items()},
}  # fmt: skip


def _finished(value: Any, _seen: frozenset[int] = frozenset()) -> Any:
    """`value` with every `_Array` replaced by its array, in lists, tuples and dicts, however deep."""
    if isinstance(value, _Array):
        if value.array is None:
            raise pickle.UnpicklingError("an array without contents")
        return value.array
    if isinstance(value, (_Answer, _DType)):
        raise pickle.UnpicklingError("a function or a dtype where a value should be")
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) in _seen:
        raise pickle.UnpicklingError("a container that holds itself")
    seen = _seen | {id(value)}
    if isinstance(value, dict):
        return {_finished(key, seen): _finished(item, seen) for key, item in value.items()}
    return type(value)(_finished(item, seen) for item in value)


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no detail"])[0][:200]
