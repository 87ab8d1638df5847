"""Split models, written as llama-gguf-split writes them: all keys in the first part, the tensors in their order.

Source: llama.cpp tools/gguf-split/gguf-split.cpp
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import TensorInfo, padded

_U16, _I32 = 2, 5  # value types


def part_paths(folder: Path, name: str, n_parts: int) -> list[Path]:
    return [folder / f"{name}-{i + 1:05}-of-{n_parts:05}.gguf" for i in range(n_parts)]


def write_split(source: Path, folder: Path, n_parts: int, *, tensors_first: bool = True, name: str = "") -> list[Path]:
    """The parts of a whole file; without `tensors_first` the first has keys only (--no-tensor-first-split)."""
    header, raw = gguf_header.read(source), source.read_bytes()
    n_groups = n_parts if tensors_first else n_parts - 1
    size = -(-len(header.tensors) // n_groups)
    groups = [header.tensors[i * size : (i + 1) * size] for i in range(n_groups)]
    groups = groups if tensors_first else [(), *groups]
    assert all(groups[not tensors_first :]), "a part without tensors"
    places = gguf_header.key_places(raw[: header.data_offset]).values()
    own_keys = raw[24 : max(place.end for place in places)]
    paths = part_paths(folder, name or source.stem, n_parts)
    for number, (path, infos) in enumerate(zip(paths, groups, strict=True)):
        keys = split_keys(number, n_parts, len(header.tensors))
        n_keys = 3 if number else 3 + len(places)
        head = raw[:8] + struct.pack("<QQ", len(infos), n_keys) + (b"" if number else own_keys) + keys + table(infos)
        with path.open("wb") as file:
            file.write(head + bytes(padded(len(head)) - len(head)))
            for info in infos:
                start = header.data_offset + info.offset
                file.write(raw[start : start + info.n_bytes] + bytes(padded(info.n_bytes) - info.n_bytes))
    return paths


def split_keys(number: int, n_parts: int, n_tensors: int) -> bytes:
    """The three keys of a part, in llama.cpp's order: setting the count anew moves it to the end."""
    rows = (
        ("split.no", _U16, "H", number),
        ("split.tensors.count", _I32, "i", n_tensors),
        ("split.count", _U16, "H", n_parts),
    )
    return b"".join(
        struct.pack(f"<Q{len(key)}sI{code}", len(key), key.encode(), kind, value) for key, kind, code, value in rows
    )


def table(infos: Sequence[TensorInfo]) -> bytes:
    parts, offset = [], 0
    for info in infos:
        name = info.name.encode()
        parts.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(info.shape)))
        parts.append(struct.pack(f"<{len(info.shape)}QIQ", *info.shape, info.type, offset))
        offset += padded(info.n_bytes)
    return b"".join(parts)
