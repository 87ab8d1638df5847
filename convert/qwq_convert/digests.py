"""SHA-256 of each tensor and of the header, kept in the file's own metadata. Knows no weights and reads no file.

The key `qwq_lite.sha256` holds an array of n_tensors + 1 strings of 64 lower-case hex digits: one for each tensor in the
order of the tensor table, over its bytes without padding, and the last one over everything before the data section,
padding included, with all digits of this array as "0". Its length never changes, so it is filled in when the last weight
has been written, and the file's own name is no part of it. Padding between tensors is zero and has no digest.

llama-gguf-split keeps the keys and their order, and adds three of its own. The digests of a model that it has split, or merged
again, are those of the header that the whole file had: `without_split`.

The digests tell damage from health. They do not tell who made a file: whoever changes it can compute them anew.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf.constants import GGUFValueType

from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import TensorInfo, Value, padded

KEY = "qwq_lite.sha256"
N_DIGITS = 64
_UNKNOWN = "0" * N_DIGITS
_COUNTS, _COUNTS_END = 8, 24  # magic and version; the numbers of tensors and keys


@dataclass(frozen=True)
class Digests:
    """What a file says of its tensors, in the order of its table, and of its header; and what the header's digest is."""

    tensors: tuple[str, ...]
    header: str
    found_header: str


def placeholder(n_tensors: int) -> tuple[Value, GGUFValueType]:
    """The key's value before the digests are known, as `gguf_writer.encode` takes it."""
    return [_UNKNOWN] * (n_tensors + 1), GGUFValueType.ARRAY


def write_digests(header: bytes, tensors: Sequence[str]) -> bytes:
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
    result = _zero_digests(header, places)
    own = hashlib.sha256(result).hexdigest()
    for place, digest in zip(places, [*tensors, own], strict=True):
        result[place : place + N_DIGITS] = digest.encode("ascii")
    return bytes(result)


def read_digests(header: bytes, n_tensors: int) -> Digests | None:
    """The digests that a header holds; None when it has none, another number of them, or an array never filled in."""
    places = _places(header, n_tensors)
    if places is None:
        return None
    said = [header[place : place + N_DIGITS].decode("ascii", "replace") for place in places]
    if set(said) == {_UNKNOWN}:
        return None
    return Digests(tuple(said[:-1]), said[-1], hashlib.sha256(_zero_digests(header, places)).hexdigest())


def without_split(header: bytes, tensors: Sequence[TensorInfo], alignment: int) -> bytes:
    """The header of the whole file that a model was before it was split, from that of its first part.

    Args:
        tensors: of all parts, in their order.
        alignment: general.alignment, or GGUF's default.

    Raises: FormatError.
    """
    places = gguf_header.key_places(header)
    split = [places[key] for key in gguf_header.SPLIT_KEYS if key in places]
    if not split:
        return header
    whole, offset = [], 0
    for info in tensors:
        whole.append(replace(info, offset=offset))
        offset += padded(info.n_bytes, alignment)
    counts = struct.pack("<QQ", len(whole), len(places) - len(split))
    keys = b"".join(header[place.key : place.end] for place in places.values() if place not in split)
    result = header[:_COUNTS] + counts + keys + _table(whole)
    return result + bytes(padded(len(result), alignment) - len(result))


def padding(header: bytes, tensors: Sequence[TensorInfo]) -> bytes:
    """What stands in a header behind the table of its tensors. Raises: FormatError."""
    places = gguf_header.key_places(header)
    end = max((place.end for place in places.values()), default=_COUNTS_END)
    return header[end + len(_table(tensors)) :]


def _table(tensors: Sequence[TensorInfo]) -> bytes:
    rows = ((info.name.encode("utf-8", "surrogateescape"), info) for info in tensors)
    return b"".join(
        struct.pack(
            f"<Q{len(name)}sI{len(info.shape)}QIQ",
            len(name),
            name,
            len(info.shape),
            *info.shape,
            info.type,
            info.offset,
        )
        for name, info in rows
    )


def _zero_digests(header: bytes, places: Sequence[int]) -> bytearray:
    result = bytearray(header)
    for place in places:
        result[place : place + N_DIGITS] = _UNKNOWN.encode("ascii")
    return result


def _places(header: bytes, n_tensors: int) -> list[int] | None:
    """Where each digest's digits start."""
    try:
        place = gguf_header.key_places(header).get(KEY)
        if place is None:
            return None
        start = place.value
        kind, element, count = struct.unpack_from("<IIQ", header, start)
        if (kind, element, count) != (GGUFValueType.ARRAY, GGUFValueType.STRING, n_tensors + 1):
            return None
        first, step = start + 16, 8 + N_DIGITS
        lengths = {struct.unpack_from("<Q", header, first + i * step)[0] for i in range(count)}
    except (struct.error, FormatError):  # not a header that gguf_header accepts
        return None
    return [first + i * step + 8 for i in range(count)] if lengths == {N_DIGITS} else None
