"""The header of a model without its weights, as a sparse file: llama.cpp counts every buffer of it before a weight exists.

45 KB for QwQ's geometry. llama.cpp takes it for the model until it reads data. Knows no llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from gguf.constants import GGUFValueType, LlamaFileType

from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.gguf_header import TensorInfo, Value
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import QuantizeOptions, needs_imatrix, tensor_types


def tensor_shapes(shape: ModelShape, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """GGUF name -> ggml's shape (columns, rows) of every tensor of a qwen2 model, in llama.cpp's order."""
    n_embd, n_ff, q = shape.n_embd, shape.n_ff, shape.n_head * shape.n_embd_head
    kv = shape.n_head_kv * shape.n_embd_head
    shapes: dict[str, tuple[int, ...]] = {} if tied else {"output.weight": (n_embd, shape.n_vocab)}
    shapes |= {"output_norm.weight": (n_embd,), "token_embd.weight": (n_embd, shape.n_vocab)}
    for layer in range(shape.n_layer):
        parts: dict[str, tuple[int, ...]] = {
            "attn_k.bias": (kv,),
            "attn_k.weight": (n_embd, kv),
            "attn_norm.weight": (n_embd,),
            "attn_output.weight": (q, n_embd),
            "attn_q.bias": (q,),
            "attn_q.weight": (n_embd, q),
            "attn_v.bias": (kv,),
            "attn_v.weight": (n_embd, kv),
            "ffn_down.weight": (n_ff, n_embd),
            "ffn_gate.weight": (n_embd, n_ff),
            "ffn_norm.weight": (n_embd,),
            "ffn_up.weight": (n_embd, n_ff),
        }
        shapes |= {f"blk.{layer}.{part}": size for part, size in parts.items()}
    return shapes


def tensors(shape: ModelShape, kind: LlamaFileType, tied: bool = False) -> list[TensorInfo]:
    """The tensors of a qwen2 model as a file of type `kind` holds them; made with importances where it has to be."""
    shapes = tensor_shapes(shape, tied)
    types = tensor_types(shapes, kind, shape.n_layer, QuantizeOptions(has_imatrix=needs_imatrix(kind)))
    return gguf_writer.layout((name, size, types[name]) for name, size in shapes.items())


def write(path: Path, shape: ModelShape, infos: list[TensorInfo]) -> None:
    """Write the header. The file has the model's size and takes the header's room, where the file system knows holes.

    Raises: OSError.
    """
    whole, real = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    keys: dict[str, tuple[Value, GGUFValueType]] = {
        f"{shape.arch}.block_count": (shape.n_layer, whole),
        f"{shape.arch}.context_length": (shape.n_ctx_train, whole),
        f"{shape.arch}.embedding_length": (shape.n_embd, whole),
        f"{shape.arch}.feed_forward_length": (shape.n_ff, whole),
        f"{shape.arch}.attention.head_count": (shape.n_head, whole),
        f"{shape.arch}.attention.head_count_kv": (shape.n_head_kv, whole),
        f"{shape.arch}.attention.layer_norm_rms_epsilon": (shape.rms_norm_eps, real),
        f"{shape.arch}.rope.freq_base": (shape.rope_freq_base, real),
        f"{shape.arch}.vocab_size": (shape.n_vocab, whole),
        "tokenizer.ggml.model": ("no_vocab", GGUFValueType.STRING),
    }
    header = gguf_writer.encode(shape.arch, keys, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(gguf_header.padded(info.n_bytes) for info in infos))
