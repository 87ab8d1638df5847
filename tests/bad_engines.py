"""Copies of the installed llama.cpp in which one kernel is broken: the first bytes of an exported function are overwritten."""

from __future__ import annotations

import platform
import shutil
import struct
import sys
from pathlib import Path

import pytest

from qwq_lite.backend import native

RET = b"\xc3"  # at once back to the caller: wrong numbers
UD2 = b"\x0f\x0b"  # no instruction: SIGILL

only_x86_linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="machine code and ELF of x86-64 Linux",
)


def broken_copy(folder: Path, functions: dict[str, bytes]) -> Path:
    """The libraries in `folder`, for LLAMA_CPP_LIB_PATH, with bytes written over the start of functions of libggml-cpu."""
    source = native.library_folder()
    assert source is not None
    copy = Path(shutil.copytree(source, folder / "lib"))
    for library in copy.glob("libggml-cpu.so*"):
        data = bytearray(library.read_bytes())
        for name, code in functions.items():
            offset = _offset(data, name)
            data[offset : offset + len(code)] = code
        library.unlink()  # it may be a link, or share its bytes with the original
        library.write_bytes(data)
    return copy


def _offset(elf: bytes | bytearray, name: str) -> int:
    """Where the code of an exported function lies in an ELF64 file. Source: ELF-64 object file format"""
    (sections_at,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, n_sections = struct.unpack_from("<HH", elf, 0x3A)
    # type, address, offset, size, link
    sections = [struct.unpack_from("<4xI8xQQQI", elf, sections_at + index * entry_bytes) for index in range(n_sections)]
    symbols = next(section for section in sections if section[0] == 11)  # SHT_DYNSYM
    names_at = sections[symbols[4]][2]
    for at in range(symbols[2], symbols[2] + symbols[3], 24):
        name_at, section, address = struct.unpack_from("<I2xHQ", elf, at)
        start = names_at + name_at
        if section and elf[start : start + len(name) + 1] == name.encode() + b"\0":
            _, base, offset, _, _ = sections[section]
            return int(address - base + offset)
    raise LookupError(f"the library exports no {name}")
