"""The header of a GGUF file, written. `gguf_header` says the layout, and reads one."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_lite.formats.gguf_header import TensorInfo, Value, padded, tensor_bytes


def layout(tensors: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType]]) -> list[TensorInfo]:
    """Places of tensors that follow each other in the given order. Shapes in ggml's order (columns first)."""
    infos, offset = [], 0
    for name, shape, kind in tensors:
        infos.append(TensorInfo(name, shape, kind, offset))
        offset += padded(infos[-1].n_bytes)
    return infos


def encode(arch: str, keys: Mapping[str, tuple[Value, GGUFValueType]], tensors: Iterable[TensorInfo]) -> bytes:
    """A header's bytes, padded: the data section starts where they end.

    `tensors` must be in the order of their offsets, as `layout` makes them; `general.architecture` comes from `arch`.
    """
    import numpy as np
    from gguf.gguf_writer import GGUFWriter, WriterState

    writer = GGUFWriter(None, arch)
    for key, (value, kind) in keys.items():
        if kind == GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for info in tensors:
        # A quantized tensor's shape is given in bytes a row, as gguf-py wants it, with a dtype of uint8.
        rows_first = tuple(reversed(info.shape))
        row_bytes = tensor_bytes(info.shape[:1], info.type)
        writer.add_tensor_info(
            info.name, (*rows_first[:-1], row_bytes), np.dtype(np.uint8), info.n_bytes, raw_dtype=info.type
        )
    memory = io.BytesIO()
    writer.fout, writer.state = [memory], WriterState.EMPTY  # what open_output_file does for a path
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = memory.getvalue()
    return header + bytes(padded(len(header)) - len(header))
