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

from qwq_lite import gguf_header
from qwq_lite.errors import FormatError
from qwq_lite.gguf_header import Value

KEY = "qwq_lite.sha256"
N_DIGITS = 64
_UNKNOWN = "0" * N_DIGITS


@dataclass(frozen=True)
class Digests:
    """What a file says of its tensors, in the order of its table, and of its header; and what the header's digest is."""

    tensors: tuple[str, ...]
    header: str
    found_header: str


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
    said = [header[place : place + N_DIGITS].decode("ascii", "replace") for place in places]
    if set(said) == {_UNKNOWN}:
        return None
    return Digests(tuple(said[:-1]), said[-1], hashlib.sha256(_zeroed(header, places)).hexdigest())


def _zeroed(header: bytes, places: Sequence[int]) -> bytearray:
    result = bytearray(header)
    for place in places:
        result[place : place + N_DIGITS] = _UNKNOWN.encode("ascii")
    return result


def _places(header: bytes, n_tensors: int) -> list[int] | None:
    """Where each digest's digits start."""
    try:
        start = gguf_header.value_offset(header, KEY)
        if start is None:
            return None
        kind, element, count = struct.unpack_from("<IIQ", header, start)
        if (kind, element, count) != (GGUFValueType.ARRAY, GGUFValueType.STRING, n_tensors + 1):
            return None
        first, step = start + 16, 8 + N_DIGITS
        lengths = {struct.unpack_from("<Q", header, first + i * step)[0] for i in range(count)}
    except (struct.error, FormatError):  # not a header that gguf_header accepts
        return None
    return [first + i * step + 8 for i in range(count)] if lengths == {N_DIGITS} else None
