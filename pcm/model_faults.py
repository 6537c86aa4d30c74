"""What an exception from a model means: too little memory, a process that is past saving, unusable
files, or this one input.
"""

import gc
import pickle
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pcm.errors import InputError, first_line, one_line

#: torch's allocators, cuBLAS, cuDNN and the CUDA runtime say it in these words. None of them harms the process.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)

#: After one of these every later call on the accelerator fails too, until the process ends (CUDA's "sticky" errors).
_STICKY = re.compile(
    r"(CUDA|HIP) error: |device-side assert|illegal memory access|uncorrectable ECC|unspecified launch failure"
    r"|driver shutting down|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED|MAPPING_ERROR)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might work."""
    import torch  # seconds to import, and a driver that only plans needs none of it

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_sticky(error: BaseException) -> bool:
    """Whether the accelerator will fail every later call of this process."""
    if is_out_of_memory(error):
        return False
    import torch

    return isinstance(error, torch.AcceleratorError) or bool(_STICKY.search(str(error)))


@contextmanager
def room_for_model(what: str, device: str) -> Iterator[None]:
    """Around the loading of a model by who has no other try: raises InputError where memory is too small for `what`, or
    the accelerator fails.
    """
    try:
        yield
    except Exception as error:
        if not (is_out_of_memory(error) or is_sticky(error)):
            raise
        raise InputError(
            f"{what}: cannot be loaded on {device} ({first_line(error)}); end what else uses it, or take another device"
        ) from error


class OutOfMemory(InputError):
    """A device has too little memory for what is computed there; the message says what helps."""


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Around torch's work whose size a user's settings decide: raises OutOfMemory, with what the user can do."""
    try:
        yield
    except RuntimeError as error:  # of torch: no file, nor Python's own memory
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory ({one_line(error, longest=200)}) {advice}") from None


def why_unusable(error: Exception) -> str:
    """What a library says of a model's files that it cannot use, in one line."""
    if isinstance(error, (pickle.UnpicklingError, EOFError)):  # torch's text says how to run what a pickle names
        return "its file of weights is damaged, or holds more than tensors"
    if isinstance(error, AssertionError) and not error.args and error.__traceback__:
        return traceback.extract_tb(error.__traceback__)[-1].line or "AssertionError"
    said = one_line(error, longest=300)
    return said if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {said}"


def free_memory() -> None:
    """Give what a failed call left behind back to the allocator; call it after the exception's own frames are gone."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
