"""SHA-256 of each tensor and of the header, kept in the file's own metadata. Knows no weights and reads no file.

The key `qwq_lite.sha256` holds an array of n_tensors + 1 strings of 64 lower-case hex digits: one for each tensor in the
order of the tensor table, over its bytes without padding, and the last one over everything before the data section,
padding included, with all digits of this array as "0". Its length never changes, so it is filled in when the last weight
has been written, and the file's own name is no part of it. Padding between tensors is zero and has no digest.

The digests tell damage from health. They do not tell who made a file: whoever changes it can compute them anew.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGUFValueType

from qwq_lite.gguf_header import Value

KEY = "qwq_lite.sha256"
N_DIGITS = 64
_UNKNOWN = "0" * N_DIGITS

_FIRST_KEY = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of keys
_WIDTHS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


@dataclass(frozen=True)
class Digests:
    """What a file says of itself. tensors: in the order of its tensor table."""

    tensors: tuple[str, ...]
    header: str


def placeholder(n_tensors: int) -> tuple[Value, GGUFValueType]:
    """The key's value before the digests are known, as `gguf_header.encode` takes it."""
    return [_UNKNOWN] * (n_tensors + 1), GGUFValueType.ARRAY


def sealed(header: bytes, tensors: Sequence[str]) -> bytes:
    """The same header with its digests in place; its length stays.

    Args:
        header: everything before the data section, with the key that `placeholder` gives.
        tensors: hex SHA-256 of each tensor's bytes, in the order of the tensor table.

    Raises: ValueError when the header has no place for so many digests.
    """
    places = _places(header, len(tensors))
    if places is None or any(len(digest) != N_DIGITS for digest in tensors):
        raise ValueError(
            f"the header has no {KEY} for {len(tensors)} tensors, or a digest is not {N_DIGITS} digits long"
        )
    result = _zeroed(header, places)
    own = hashlib.sha256(result).hexdigest()
    for place, digest in zip(places, [*tensors, own], strict=True):
        result[place : place + N_DIGITS] = digest.encode("ascii")
    return bytes(result)


def stored(header: bytes, n_tensors: int) -> Digests | None:
    """The digests that a header holds; None when it has none, another number of them, or an array never filled in."""
    places = _places(header, n_tensors)
    if places is None:
        return None
    found = [header[place : place + N_DIGITS].decode("ascii", "replace") for place in places]
    return None if set(found) == {_UNKNOWN} else Digests(tuple(found[:-1]), found[-1])


def of_header(header: bytes, n_tensors: int) -> str | None:
    """What the last entry of the array must be, hex; None when there is no array of this length."""
    places = _places(header, n_tensors)
    return None if places is None else hashlib.sha256(_zeroed(header, places)).hexdigest()


def _zeroed(header: bytes, places: Sequence[int]) -> bytearray:
    result = bytearray(header)
    for place in places:
        result[place : place + N_DIGITS] = _UNKNOWN.encode("ascii")
    return result


def _places(header: bytes, n_tensors: int) -> list[int] | None:
    """Where each digest's digits start. Found by walking the keys: a search could be led astray by another key's text."""
    try:
        start = _value_of(header, KEY.encode("ascii"))
        if start is None:
            return None
        kind, element, count = struct.unpack_from("<IIQ", header, start)
        if (kind, element, count) != (GGUFValueType.ARRAY, GGUFValueType.STRING, n_tensors + 1):
            return None
        first, step = start + 16, 8 + N_DIGITS
        lengths = {struct.unpack_from("<Q", header, first + i * step)[0] for i in range(count)}
    except (struct.error, ValueError):  # not a header that gguf_header accepts
        return None
    return [first + i * step + 8 for i in range(count)] if lengths == {N_DIGITS} else None


def _value_of(header: bytes, wanted: bytes) -> int | None:
    """Where a key's value starts, its type first."""
    (n_keys,) = struct.unpack_from("<Q", header, _FIRST_KEY - 8)
    position = _FIRST_KEY
    for _ in range(n_keys):
        end = _after_string(header, position)
        if header[position + 8 : end] == wanted:
            return end
        position = _after_value(header, end)
    return None


def _after_string(header: bytes, position: int) -> int:
    return position + 8 + int(struct.unpack_from("<Q", header, position)[0])


def _after_value(header: bytes, position: int) -> int:
    kind = GGUFValueType(struct.unpack_from("<I", header, position)[0])
    position, count = position + 4, 1
    if kind == GGUFValueType.ARRAY:
        raw, count = struct.unpack_from("<IQ", header, position)
        kind, position = GGUFValueType(raw), position + 12
    if kind != GGUFValueType.STRING:
        return position + count * _WIDTHS[kind]
    for _ in range(count):
        position = _after_string(header, position)
    return position
