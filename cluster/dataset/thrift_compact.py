"""Thrift's compact protocol, as much of it as the page headers of a Parquet file need.

After the protocol's specification (apache/thrift, doc/specs/thrift-compact-protocol.md).
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
#: Structs and lists inside each other: a page header needs 3, and damaged bytes must not recurse without end.
_DEEPEST = 16


class Malformed(ValueError):
    """The bytes are no struct of this protocol, or one with types that page headers do not use."""


def read_struct(data: memoryview, position: int, *, depth: int = 0) -> tuple[dict[int, Any], int]:
    """(fields by their number, position behind) of the struct that begins at `position`.

    Integers are int, true and false bool, binaries bytes, structs dict and lists list. Raises Malformed.
    """
    if depth > _DEEPEST:
        raise Malformed("structs too deep")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, position = _byte(data, position)
        if head == 0:
            return fields, position
        kind, delta = head & 0x0F, head >> 4
        if delta:
            number += delta
        else:
            number, position = _zigzag(data, position)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(data, position, kind, depth)


def _value(data: memoryview, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, position)
    if kind == _BYTE:
        return _byte(data, position)
    if kind in (_DOUBLE, _BINARY):
        length, position = (8, position) if kind == _DOUBLE else _varint(data, position)
        if position + length > len(data):
            raise Malformed("ends early")
        return bytes(data[position : position + length]), position + length
    if kind == _STRUCT:
        return read_struct(data, position, depth=depth + 1)
    if kind in (_LIST, _SET):
        return _list(data, position, depth + 1)
    raise Malformed(f"type {kind}")


def _list(data: memoryview, position: int, depth: int) -> tuple[list[Any], int]:
    if depth > _DEEPEST:
        raise Malformed("lists too deep")
    head, position = _byte(data, position)
    count, kind = head >> 4, head & 0x0F
    if count == 15:
        count, position = _varint(data, position)
    values = []
    for _ in range(count):  # every item takes a byte at least, so damaged counts end with the data
        value, position = _byte(data, position) if kind in (_TRUE, _FALSE) else _value(data, position, kind, depth)
        values.append(value)
    return values, position


def _byte(data: memoryview, position: int) -> tuple[int, int]:
    if position >= len(data):
        raise Malformed("ends early")
    return data[position], position + 1


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte, position = _byte(data, position)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise Malformed("an integer of more than 64 bits")


def _zigzag(data: memoryview, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position
