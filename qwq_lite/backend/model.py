"""A model's weights in this process. Knows no context and no chat."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwq_lite.backend import devices, native
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.backend.vocab import Vocab
from qwq_lite.errors import EngineError

ALL_LAYERS = -1
_LOAD_MODES = {"none": 0, "mmap": 1}  # enum llama_load_mode


def model_params(api: Any, choice: EngineSettings) -> Any:
    """llama_model_params of a choice; `measure` asks with the same. What borrows memory is kept by the structure itself."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = choice.n_gpu_layers
    params.load_mode = _LOAD_MODES[choice.load_mode]
    params.use_extra_bufts, params.no_host = choice.repack, choice.no_host
    gpus = devices.gpu_pointers()
    if gpus:
        # Only those that get layers: any other would be opened, and would make llama.cpp keep copies of a graph's inputs.
        shares = choice.tensor_split or ((1,) if choice.n_gpu_layers else ())
        used = [(gpu, share) for gpu, share in zip(gpus, shares, strict=False) if share]
        n_most = api.llama_max_devices()
        pointers = (ctypes.c_void_p * (len(used) + 1))(*(gpu for gpu, _ in used), None)
        split = (ctypes.c_float * n_most)(*(share for _, share in used))
        params.devices = ctypes.cast(pointers, ctypes.c_void_p)
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        params.kept = pointers, split
    return params


class LoadedModel:
    """Weights and vocabulary of a GGUF file, loaded by llama.cpp.

    Args:
        path: the file; its header has been validated by gguf_header.read.
        choice: where its weights go; default all layers on the GPU where there is one.
        vocab_only: no weights, for tokenizing.
        token_types: the file's tokenizer.ggml.token_type, for Vocab.
        on_progress: called with 0…1 while weights are read, on the calling thread.

    Raises: EngineError with llama.cpp's last lines.
    """

    def __init__(
        self,
        path: Path,
        choice: EngineSettings = EngineSettings(0, n_gpu_layers=ALL_LAYERS),  # noqa: B008 - frozen
        *,
        vocab_only: bool = False,
        token_types: Sequence[int] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self._api = api = native.engine()
        failures: list[BaseException] = []
        params = model_params(api, choice)
        params.vocab_only = vocab_only
        if on_progress is not None:
            report = on_progress

            def progress(share: float, _user: object) -> bool:
                try:
                    report(share)
                except BaseException as error:  # Ctrl-C most of all: an exception cannot cross C, so it is kept
                    failures.append(error)
                return not failures

            self._progress = api.llama_progress_callback(progress)
            params.progress_callback = self._progress
        self.pointer: Any = api.llama_model_load_from_file(os.fsencode(path), params)
        if failures:
            self.close()
            raise failures[0]
        if not self.pointer:
            raise EngineError(f"{path}: llama.cpp cannot load it: {native.last_lines() or 'it gave no reason'}")
        self.path = path
        self.vocab = Vocab(self.pointer, token_types)

    def close(self) -> None:
        if self.pointer:
            self._api.llama_model_free(self.pointer)
            self.pointer = None
