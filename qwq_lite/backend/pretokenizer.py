"""The stack that llama.cpp's pre-tokenizers take: a thread that has enough of it, and the longest run of letters that fits.

Vocabularies of byte-level BPE cut a text by a regular expression. A few expressions have code of their own in llama.cpp; the
others run on std::regex, which recurses once for each character of a match and ends the process where the stack ends.

Measured with gcc's library, on each of the 90 names that llama.cpp knows and 27 kinds of text: at most 321.5 bytes a character,
whatever the name and the kind. A stack of 256 MiB takes runs of 830,000 characters and dies of 850,000. A match may hold two
runs (signs, then newlines), so each may have half of that. Other libraries than gcc's were not measured.
Source: llama.cpp src/unicode.cpp (unicode_regex_split_stl), src/llama-vocab.cpp (llm_tokenizer_bpe)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from qwq_lite.errors import UsageError

T = TypeVar("T")

FIELD = "tokenizer.ggml.pre"
SHORT = 500  # characters that any thread's stack has room for: 160 kB of the 512 kB that the smallest default is
# A stack's bytes, and the longest run that it may be given. The first that the system grants is used.
STACKS = ((256 << 20, 400_000), (64 << 20, 100_000), (16 << 20, 25_000))
_OWN_STACK = 750  # the longest run on a stack of 512 kB
# The values of tokenizer.ggml.pre whose expressions have code of their own: 1.2 bytes a character, on each kind of text.
_WITHOUT_RECURSION = """
    a.x-4.0 chameleon chatglm-bpe codeshell command-r dbrx deepseek-r1-qwen exaone exaone4 f2llmv2 falcon-h1 falcon3 gemma4
    gigachat glm4 glm5 gpt-2 granite-docling granite-embed-multi-311m grok-2 hunyuan jais jina-de jina-es jina-v1-en
    jina-v2-code jina-v2-de jina-v2-es jina-v5-nano kimi-k2 kormo laguna lfm2 llama-bpe llama-v3 llama3 megrez mellum mellum2
    midm-2.0 minerva-7b modern-bert mpt olmo phi-2 pixtral qwen2 qwen35 refact roberta-bpe sarvam-moe smaug-bpe smollm
    solar-open stablelm2 starcoder trillion
"""
# What one match may hold at most. Nearly all expressions part white space from the rest; exaone-moe's takes spaces into words.
# What else than these four characters is white space is not asked: rare kinds count in both runs.
_WORD, _LINE, _SPACE = re.compile(r"[^ \t\r\n]+"), re.compile(r"[^\r\n]+"), re.compile(r"\s+")
_BY_LINE = frozenset({"exaone-moe"})
_starting = threading.Lock()


def recurses(model: str, pre: str) -> bool:
    """Whether a vocabulary of this tokenizer.ggml.model and tokenizer.ggml.pre may recurse once a character."""
    return model == "gpt2" and pre not in _WITHOUT_RECURSION.split()


def longest_run(text: str, pre: str) -> int:
    """Characters of the longest part of a text that one match of the pre-tokenizer may take."""
    kinds = (_LINE if pre in _BY_LINE else _WORD, _SPACE)
    return max((match.end() - match.start() for kind in kinds for match in kind.finditer(text)), default=0)


def call(work: Callable[[], T], text: str, pre: str, *, bounded: bool) -> T:
    """What `work` returns or raises, which tokenizes `text`, on a thread with the stack that it needs.

    bounded: as `recurses` says; else any text is taken.
    Raises: UsageError for a text with a run that does not fit; nothing is cut.
    """
    if len(text) <= SHORT:
        return work()
    for stack_bytes, most in STACKS:
        if bounded:
            _check(text, pre, most)
        found = _on_stack(work, stack_bytes)
        if found is not None:
            return found.result()
    if bounded:  # no thread at all: the interpreter is ending, or the system is full
        _check(text, pre, _OWN_STACK)
    return work()


def _check(text: str, pre: str, most: int) -> None:
    if len(text) <= most or (n_run := longest_run(text, pre)) <= most:
        return
    what = "a line" if pre in _BY_LINE else "a run without white space, or of nothing else,"
    raise UsageError(
        f"the text holds {what} of {n_run:,} characters; the model's tokenizer ({FIELD}: {pre or 'none'}) takes {most:,} at"
        " most, for each takes stack; break it up or leave it out"
    )


def _on_stack(work: Callable[[], T], stack_bytes: int) -> Future[T] | None:
    """Do the work on a thread with a stack of that size, and wait for its end; None where the system refuses such a thread.

    A thread for each long text costs 0.1 ms. One that is kept would keep what a long run took of its stack.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="qwq-lite tokenizer", daemon=True)
    try:
        with _starting:  # the size holds for all threads of the process that start meanwhile
            before = threading.stack_size(stack_bytes)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
    except (ValueError, RuntimeError, MemoryError):
        return None
    except BaseException:  # Ctrl-C: the thread may run
        _join(thread)
        raise
    _join(thread)
    return future


def _join(thread: threading.Thread) -> None:
    """Wait for a thread's end, Ctrl-C or not: the vocabulary that it reads may be freed once its caller is gone."""
    interruption: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption
