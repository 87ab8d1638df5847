"""A model's weights in this process. Knows no context and no chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwq_lite.backend import native
from qwq_lite.backend.vocab import Vocab
from qwq_lite.errors import EngineError

ALL_LAYERS = -1


class LoadedModel:
    """Weights and vocabulary of a GGUF file, loaded by llama.cpp.

    Args:
        path: the file; its header has been validated by gguf_header.read.
        n_gpu_layers: layers kept on the GPU, ALL_LAYERS for all; without a GPU it says nothing.
        vocab_only: no weights, for tokenizing.
        repack: copy weights on the CPU into a layout that its kernels like better, as anonymous memory.
        token_types: the file's tokenizer.ggml.token_type, for Vocab.
        on_progress: called with 0…1 while weights are read, on the calling thread.

    Raises: EngineError with llama.cpp's last lines.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = ALL_LAYERS,
        vocab_only: bool = False,
        repack: bool = True,
        token_types: Sequence[int] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self._api = api = native.engine()
        failures: list[BaseException] = []
        params = api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = repack
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
