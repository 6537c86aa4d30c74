"""Published pickles are read without executing anything that they ask for."""

import collections
import contextlib
import io
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from pcm.errors import InputError
from pcm.safe_pickle import reader as safe_pickle
from tests.helpers.malicious import Touch
from tests.helpers.paths import ROOT


def same(left, right):
    if isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(right, (np.ndarray, np.generic)):
        return type(left) is type(right) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(right, dict):
        return isinstance(left, dict) and list(left) == list(right) and all(same(left[k], right[k]) for k in right)
    if isinstance(right, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@pytest.mark.parametrize("protocol", range(6))
def test_published_forms_are_read_in_every_protocol(protocol):
    annotations = [
        {"image_id": "6000000", "split_id": 3, "clipscore": 0.7,
         "tokens_ids": np.arange(12).reshape(2, 6), "target_ids": np.full((2, 6), -1, dtype=np.int32)},
        {"image_id": "6000001", "clipscore": np.float32(0.5), "tokens_ids": np.ones((2, 3), np.uint16, order="F")},
    ]  # fmt: skip
    concepts = (["dog", "café"], torch.randn(2, 8), {1, 2}, frozenset(["x"]), b"bytes", None, True, 2 + 1j)
    for value in (annotations, concepts):
        assert same(safe_pickle.load(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 4).half(), torch.randn(3).bfloat16(), torch.arange(5), torch.tensor([True]), torch.tensor(3.0),
     torch.randn(4, 6).t()[1:5, ::2], torch.empty(0, 3), torch.nn.Parameter(torch.ones(2)).detach()],
)  # fmt: skip
def test_tensors_of_any_dtype_and_stride_are_read(tensor, protocol):
    assert same(safe_pickle.load(pickle.dumps([tensor], protocol)), [tensor])


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "array",
    [np.array(["a", "bc"]), np.array(["a", None, 3], object), np.array([b"xy"]), np.ones(2, ">f4"), np.zeros((0, 3)),
     np.array([True]), np.array(1.5), np.array([np.arange(2), np.arange(3)], dtype=object)],
)  # fmt: skip
def test_arrays_of_numbers_strings_and_objects_are_read(array, protocol):
    loaded = safe_pickle.load(pickle.dumps({"x": array}, protocol))["x"]
    assert loaded.dtype == array.dtype and loaded.shape == array.shape
    assert all(np.array_equal(left, right) for left, right in zip(loaded.flat, array.flat, strict=True))
    assert loaded.flags.writeable


def test_numpy_of_any_version_is_named_the_same():
    data = pickle.dumps(np.arange(4), 2)
    assert b"numpy._core" in data
    np.testing.assert_array_equal(safe_pickle.load(data.replace(b"numpy._core", b"numpy.core")), np.arange(4))


def test_arrays_shared_in_one_pickle_stay_equal():
    shared = np.arange(3)
    left, right = safe_pickle.load(pickle.dumps([shared, (shared,)]))
    np.testing.assert_array_equal(left, right[0])


def test_ordered_dicts_come_back_as_dicts():
    assert safe_pickle.load(pickle.dumps(collections.OrderedDict(a=1, b=[2]))) == {"a": 1, "b": [2]}


def test_files_of_torch_save_are_read(tmp_path):
    for zipped in (True, False):
        torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        assert same(safe_pickle.load(tmp_path / "m.pth"), {"model": {"w": torch.ones(2)}})


@pytest.mark.parametrize("protocol", range(6))
def test_a_command_in_a_pickle_is_refused_by_name_and_not_executed(tmp_path, protocol):
    victim = tmp_path / "executed"
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps((["dog"], [Touch(victim)]), protocol))
    with pytest.raises(InputError, match=r"bad.pkl: refused: the pickle names (posix|os)\.system"):
        safe_pickle.load(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())  # the usual reader does execute it: the pickle is a real attack
    assert victim.exists()


def nested_in_load_from_bytes(inner):
    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    return pickle.dumps(Nested())


@pytest.mark.parametrize("form", ["pickle", "legacy", "zip", "storage"])
def test_a_command_nested_in_a_torch_storage_is_not_executed(tmp_path, form):
    victim = tmp_path / "executed"
    buffer = io.BytesIO()
    if form == "pickle":
        buffer.write(pickle.dumps(Touch(victim)))
    elif form == "storage":  # a storage whose description, the fourth of its pickles, is the command
        for part in (0x1950A86A20F9469CFC6C, 1001, {}, Touch(victim), ["0"]):
            pickle.dump(part, buffer)
    else:
        torch.save([Touch(victim)], buffer, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError):
        safe_pickle.load(nested_in_load_from_bytes(buffer.getvalue()))
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "builtins __import__", "torch load", "torch.serialization load", "numpy load",
     "torch._utils _rebuild_tensor", "functools partial",
     "pcm.safe_pickle.reader load", "numpy._core.multiarray frombuffer",
     "torch.jit load", "operator attrgetter", "builtins list.append", "numpy ndarray.tofile"],
)  # fmt: skip
def test_every_other_name_is_refused(name):
    module, attribute = name.split(" ")
    data = (
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93."
    )
    with pytest.raises(InputError, match=f"names {module}.{attribute}, which arrays and tensors do not need"):
        safe_pickle.load(data)


def test_raw_bytes_cannot_pass_for_object_pointers():
    # NumPy itself accepts a void dtype whose pickled flags say "holds objects", and then follows the bytes as pointers.
    array = np.array([b"AAAAAAAA"], "V8")
    array.dtype.__setstate__((3, "|", None, None, None, 8, 1, 63))
    assert array.dtype.hasobject
    state = pickle.dumps(np.dtype("f8"), 2).replace(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", b"K\x08K\x01K\x3f")
    assert pickle.loads(state).flags == 63
    with pytest.raises(InputError, match="a function or a dtype where a value should be"):
        safe_pickle.load(state)
    forged = pickle.dumps([np.ones(1)], 2).replace(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", b"K\x08K\x01K\x3f")
    loaded = safe_pickle.load(forged)[0]
    assert not loaded.dtype.hasobject and loaded[0] == 1.0
    with pytest.raises(InputError, match="'V8' is not one of"):
        safe_pickle.load(pickle.dumps(np.zeros(1, "V8")))


@pytest.mark.parametrize("opcode", [pickle.LONG_BINPUT, pickle.BYTEARRAY8])
def test_one_damaged_byte_does_not_cost_gigabytes(opcode):
    # A memo index of 946 million, as a flipped byte makes it: the unpickler in C fills a table up to it.
    data = b"\x80\x05]" + opcode + (946406028).to_bytes(4 if opcode == pickle.LONG_BINPUT else 8, "little") + b"."
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):
            safe_pickle.load(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("instance", [np.ones(2), np.float32(1), torch.ones(2)])
def test_the_state_of_values_cannot_be_set(instance):
    data = pickle.dumps(instance, 5)[:-1] + b"(K\x01tb."
    with pytest.raises(InputError, match="sets the state of something else than an array"):
        safe_pickle.load(data)


def test_a_tensor_larger_than_its_storage_is_refused():
    data = pickle.dumps(torch.ones(4), 2).replace(b"K\x04\x85", b"K\x09\x85")
    with pytest.raises(InputError, match="larger than its storage"):
        safe_pickle.load(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"\x80\x04", b"\x80\x04.", b"PK\x03\x04broken", pickle.dumps(np.ones(9))[:-30],
     b"\x80\x04]\x94h\x00a.",
     struct.pack("<BBB", 0x80, 4, 0x52) + b".", b"cnumpy\ndtype\n.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f."],
)  # fmt: skip
def test_damaged_pickles_are_one_clear_line(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.pkl: ") as error:
        safe_pickle.load(tmp_path / "x.pkl")
    assert "\n" not in str(error.value)


def test_missing_file_is_one_clear_line():
    with pytest.raises(InputError, match="cannot be read"):
        safe_pickle.load("/no/such/file.pkl")


OPERATIONS = np.frombuffer(b"2)(]}\x85\x86\x87Rbaeustdlhjqr0\x8f\x90\x91\x93\x94c.", np.uint8)

# Small pickles that would take a usual reader, or a careless one, for ever or all memory. A test that hangs has failed.

DOUBLED = b"]" + b"2\x86" * 200  # a pair of the pair of ... of one list, 200 levels deep
BIG_LIST = b"](" + b"K\x01" * 20_000 + b"e"
# Integers with one hash: a dict of n of them takes n * n steps.
NUMBERS = b"(" + b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(1, 4)) + b"d"


class Rebuilt:
    """A tensor as its storage, size and stride; several may have one storage."""

    def __init__(self, storage, size, stride):
        self.arguments = (storage, 0, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def rebuilt(tensor, size, stride):
    return pickle.dumps(Rebuilt(tensor.storage(), size, stride), 2)[2:-1]


def test_what_is_shared_is_built_once():
    loaded = safe_pickle.load(b"\x80\x04" + DOUBLED + b".")
    for _ in range(200):
        assert len(loaded) == 2 and loaded[0] is loaded[1]
        loaded = loaded[0]
    items = pickle.dumps(np.array([None, None], object), 2)[2:-1].replace(b"](NNe", b"](" + DOUBLED + b"Ne")
    assert safe_pickle.load(b"\x80\x02" + items + b".").shape == (2,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"}" + DOUBLED + b"Ns", "a key that is neither"),
        (b"}(" + DOUBLED + b"Nu", "a key that is neither"),
        (b"(" + DOUBLED + b"Nd", "a key that is neither"),
        (b"(" + DOUBLED + b"\x91", "a key that is neither"),
        (b"\x8f(" + DOUBLED + b"\x90", "a key that is neither"),
        (b"cbuiltins\nset\n(" + b"]" + DOUBLED + b"a" + b"tR", "a key that is neither"),
        (b"ccollections\nOrderedDict\n](](" + DOUBLED + b"Nee\x85R", "a key that is neither"),
        (NUMBERS, "a key that is neither"),
        (b"}(" + b"K\x01" * 1000 + b"tNs", "a key of many parts"),
        (b"cnumpy\ndtype\n" + DOUBLED + b"\x85R", "dtype tuple is not"),
        (b"ctorch\nSize\n" + DOUBLED + b"\x85R", "a size of what are no sizes"),
        (BIG_LIST + b"q\x00" + b"cbuiltins\nset\nh\x00\x85R" * 2, None),
        (b"X" + (1_000_000).to_bytes(4, "little") + b"x" * 1_000_000 + b"q\x00"
         + b"c_codecs\nencode\nh\x00\x85R" * 1000, "it copies more than it holds"),
        (rebuilt(torch.ones(1), (2**31,), (1,)), "larger than its storage"),
        (rebuilt(torch.ones(1), (2**31,), (0,)), "larger than its storage"),
        (rebuilt(torch.ones(1), (1,) * 65, (0,) * 65), "without a storage, size or stride"),
        (pickle.dumps(np.ones(1), 2)[2:-1].replace(b"K\x01\x85q", b"(" + b"J\xff\xff\xff\x7f" * 1000 + b"tq", 1),
         "without a shape"),
        (pickle.dumps(np.ones(3), 5)[2:-1] + b"K\x00K\x01s", "fills something else than a dict"),
        (pickle.dumps(torch.ones(3), 2)[2:-1] + b"(K\x01\x90", "fills something else than a set"),
        (pickle.dumps(torch.ones(3), 2)[2:-1] + b"K\x01a", "fills something else than a list"),
        (b"K\x01(K\x02e", "fills something else than a list"),
        (b"](K\x01tR", "calls what is no function"),
        (b"ctorch\nFloatStorage\n(tR", "calls what is no function"),
    ],
)  # fmt: skip
def test_small_pickles_cost_little_and_are_refused(data, message):
    if message is None:
        safe_pickle.load(b"\x80\x04" + data + b".")
        return
    with pytest.raises(InputError, match=message):
        safe_pickle.load(b"\x80\x04" + data + b".")


@pytest.mark.parametrize(
    "copied",
    [b"cbuiltins\nset\nh\x00\x85R0", b"ccollections\nOrderedDict\n]h\x00a\x85R0", b"cbuiltins\nfrozenset\nh\x00\x85R0"],
)
def test_reading_the_same_again_and_again_is_refused(copied):
    many = b"](" + b"K\x01" * 20_000 + b"eq\x00"
    with pytest.raises(InputError, match=r"copies more than it holds|a dict of what are no pairs"):
        safe_pickle.load(b"\x80\x04" + many + copied * 10_000 + b"h\x00.")


def test_tensors_of_one_storage_share_it():
    storage = torch.arange(1000.0).storage()
    loaded = safe_pickle.load(pickle.dumps([Rebuilt(storage, (k,), (1,)) for k in range(1, 1000)]))
    assert all(torch.equal(tensor, torch.arange(float(k))) for k, tensor in enumerate(loaded, start=1))
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded}) == 1


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_no_damaged_pickle_executes_anything_or_ends_otherwise_than_in_one_line(tmp_path, protocol):
    victim = tmp_path / "executed"
    good = [
        {"image_id": "6000000", "split_id": 1, "clipscore": np.float32(0.7), "tokens_ids": np.arange(12).reshape(2, 6)},
        (["dog", "cat"], torch.randn(2, 3)), collections.OrderedDict(a={1}, b=frozenset("x")), np.array([None, "a"]),
    ]  # fmt: skip
    bases = [pickle.dumps(good, protocol), pickle.dumps([good, Touch(victim)], protocol)]
    random = np.random.default_rng(protocol)
    refused = 0
    for round_ in range(600):
        data = bytearray(bases[round_ % 2])
        for _ in range(random.integers(1, 6)):
            start, length = random.integers(len(data)), random.integers(1, 9)
            piece = [
                random.integers(0, 256, length, np.uint8).tobytes(),  # noise
                random.choice(OPERATIONS, length).tobytes(),
                bytes(data[(other := random.integers(len(data))) : other + length]),  # from elsewhere
                b"",
            ][random.integers(4)]  # fmt: skip
            data[start : start + length] = piece
        try:
            safe_pickle.load(bytes(data))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
    assert not victim.exists()


SECURITY = ROOT / "tests/data/cases/security"


@pytest.mark.parametrize(
    ("name", "said"),
    [("annotations_amplified.pickle", "many more values than it holds"), ("complex_collide_20000.pkl", "complex")],
)
def test_small_files_that_would_cost_much_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        safe_pickle.load(SECURITY / name)


@pytest.mark.parametrize("key", [(1, 2), (1.5, 2), (1, "a", 2), (np.int64(1), 2), np.complex64(1j), 1j, (None, 1)])
def test_keys_whose_hashes_can_be_chosen_are_refused(key: Any) -> None:
    for value in ({key: 0}, {key}):
        with pytest.raises(InputError, match=r"a key (of several numbers|that is a complex number)"):
            safe_pickle.load(pickle.dumps(value))


@pytest.mark.parametrize("key", [("a", "b"), ("a", 1), (1,), 1, 1.5, "a", b"a", None, True])
def test_keys_that_people_use_are_read(key: Any) -> None:
    assert safe_pickle.load(pickle.dumps({key: 1})) == {key: 1}


def test_what_is_shared_a_few_times_is_read_and_stays_shared() -> None:
    inner = [1, 2, 3]
    value = safe_pickle.load(pickle.dumps([inner] * 1000))
    assert value == [inner] * 1000 and value[0] is value[999]


def test_lists_that_double_are_refused() -> None:
    value: list = [0] * 1000
    for _ in range(40):
        value = [value, value]
    with pytest.raises(InputError, match="repeats some without end"):
        safe_pickle.load(pickle.dumps(value))
