"""What is known to end or hang llama.cpp, through the public API: the host goes on, and hears why."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from gguf import GGUFValueType as Kind

import qwq_lite
from qwq_lite.formats import gguf_header, gguf_writer
from tests.samples import sample

WAIT_S = 120
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[qwq_lite.Model]:
    with qwq_lite.load(demo_gguf, n_ctx=1024) as loaded:
        yield loaded


@pytest.fixture
def alive(model: qwq_lite.Model) -> Iterator[qwq_lite.Model]:
    """The model, which must answer afterwards from the process that it was loaded in."""
    before = model.pid  # type: ignore[attr-defined]
    yield model
    assert model.ask("Hi", max_tokens=2).stats.n_generated
    assert model.pid == before  # type: ignore[attr-defined]


@pytest.fixture
def debuggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which gdb and lldb leave their names when ggml calls one of them to a crash."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    called.mkdir()
    for name in ("gdb", "lldb"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {called / name}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return called


def error_of(call: Callable[[], object]) -> BaseException | None:
    """What a call raises, on a thread of its own, for it may never return."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    return found[0] if found else None


KINDS = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING, list: Kind.ARRAY}


def rewritten(source: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    """The file with other keys; a change may be a function of what is there. Another architecture takes its keys along."""
    header = gguf_header.read(source)
    keys = {**header.keys}
    for name, change in changes.items():
        keys[name] = change(keys[name]) if callable(change) else change
    arch = str(keys.pop("general.architecture"))
    typed = {name.replace("qwen2.", f"{arch}.", 1): (value, KINDS[type(value)]) for name, value in keys.items()}
    with source.open("rb") as file:
        file.seek(header.data_offset)
        target.write_bytes(gguf_writer.encode(arch, typed, header.tensors) + file.read())
    return target


def same_token_twice(tokens: list[str]) -> list[str]:
    return [*tokens[:5000], tokens[5001], *tokens[5001:]]


HEADERS: dict[str, tuple[str, Any]] = {
    "no layers": ("qwen2.block_count", 0),
    "too many layers": ("qwen2.block_count", 100_000),
    "rope dimensions": ("qwen2.rope.dimension_count", 62),
    "key length": ("qwen2.attention.key_length", 32),
    "negative eps": ("qwen2.attention.layer_norm_rms_epsilon", -1.0),
    "eps is no number": ("qwen2.attention.layer_norm_rms_epsilon", math.nan),
    "a token twice": ("tokenizer.ggml.tokens", same_token_twice),
    "rope scaling": ("qwen2.rope.scaling.type", "spiral"),
    "heads that do not divide": ("qwen2.attention.head_count", 7),
    "no columns": ("qwen2.embedding_length", 0),
    "rope base": ("qwen2.rope.freq_base", math.nan),
    "no context": ("qwen2.context_length", 0),
    "alignment": ("general.alignment", 3),
    "a template that is no text": ("tokenizer.chat_template", 7),
}


@pytest.mark.parametrize("name", sample(HEADERS, 4))
def test_a_header_that_ends_llama_cpp_is_refused_before(demo_gguf: Path, tmp_path: Path, name: str) -> None:
    key, change = HEADERS[name]
    bad = rewritten(demo_gguf, tmp_path / "bad.gguf", {key: change})
    with pytest.raises(qwq_lite.QwqError, match=re.escape(key.removeprefix("qwen2."))) as caught:
        qwq_lite.load(bad)
    assert not isinstance(caught.value, qwq_lite.EngineCrashed)
    assert "bad.gguf" in str(caught.value)


def test_forty_thousand_special_tokens_load(demo_gguf: Path, tmp_path: Path) -> None:
    def special(kinds: list[int]) -> list[int]:
        return [int(gguf.TokenType.CONTROL)] * len(kinds)

    file = rewritten(demo_gguf, tmp_path / "special.gguf", {"tokenizer.ggml.token_type": special})
    with qwq_lite.load(file, n_ctx=512) as loaded:
        assert loaded.ask("Hello there", max_tokens=3).stats.n_generated


# What no check of ours finds. Who writes one moves the row to HEADERS.
DEADLY: dict[str, tuple[str, Any, str]] = {
    "an assertion": ("general.architecture", "dream", "GGML_ASSERT"),
    "an exception of C++": ("tokenizer.ggml.model", "llama", "unordered_map::at"),
}


@posix
@pytest.mark.parametrize("name", DEADLY)
def test_a_file_that_does_end_the_engine_ends_nothing_else(
    alive: qwq_lite.Model, demo_gguf: Path, tmp_path: Path, debuggers: Path, name: str
) -> None:
    key, change, said = DEADLY[name]
    bad = rewritten(demo_gguf, tmp_path / "bad.gguf", {key: change})
    before = psutil.Process().children()
    with (
        pytest.raises(qwq_lite.EngineCrashed, match=re.escape(said)) as caught,
        qwq_lite.load(bad, n_ctx=512) as loaded,
    ):
        loaded.ask("Hi", max_tokens=2)
    assert "bad.gguf" in str(caught.value)
    assert caught.value.signal == "SIGABRT"
    assert not list(debuggers.iterdir())
    assert psutil.Process().children() == before


TEMPLATES = {
    "a huge text": "{{ 'x' * 10 ** 12 }}",
    "a huge power": "{{ 7 ** (7 ** 9) }}",
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a list that doubles": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a product of lists": "{{ ([0] * 99999) * 99999 }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "a filter": "{{ 'x' | center(10 ** 12) }}",
    "what Python has inside": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a word that is no template": "{% for %}",
    "a number of ten million digits": "{{ (10 ** 99999) ** 99 }}",
    "macros that call each other": (
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}"
    ),
    "deep nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", sample(TEMPLATES, 3))
def test_a_template_that_takes_for_ever_is_an_error(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    file = rewritten(tiny_gguf, tmp_path / "bad.gguf", {"tokenizer.chat_template": TEMPLATES[name]})
    before = psutil.Process().memory_info().rss
    with (
        pytest.raises(qwq_lite.TemplateError, match=r"tokenizer\.chat_template"),
        qwq_lite.load(file, n_ctx=512) as loaded,
    ):
        loaded.ask("Hi", max_tokens=2)
    assert psutil.Process().memory_info().rss - before < 1 << 28


@pytest.mark.parametrize("tokens", [[-1], [49152], [2**40], [-(2**70)], [1.5], [True], [None], []])
def test_tokens_that_there_are_not(alive: qwq_lite.Model, tokens: list[Any]) -> None:
    with pytest.raises(qwq_lite.UsageError, match=r"token|message|prompt"):
        list(alive.generate(tokens, max_tokens=1))


MESSAGES: list[Any] = ["text", [1], {}, {"role": 5}, {"role": "user"}, {"role": "user", "content": None}]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_messages_that_are_none(alive: qwq_lite.Model, message: Any) -> None:
    with pytest.raises((qwq_lite.UsageError, qwq_lite.TemplateError), match="message"):
        alive.generate([message])


OPTIONS: list[dict[str, Any]] = [
    {"temperature": math.nan},
    {"temperature": -1.0},
    {"temperature": math.inf},
    {"temperature": True},
    {"top_p": 2.0},
    {"top_p": 0},
    {"top_k": -5},
    {"top_k": 2**40},
    {"min_p": "a"},
    {"max_tokens": 0},
    {"max_tokens": 2**40},
    {"max_tokens": "9"},
    {"seed": -1},
    {"seed": 2**64},
    {"stop": [""]},
    {"stop": ["x" * 10**6]},
    {"stop": ["\ud800"]},
    {"tools": [1]},
    {"when_full": "?"},
    {"grammar": "root ::= [z-a]"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options)[:40])
def test_options_that_cannot_be_meant(alive: qwq_lite.Model, options: dict[str, Any]) -> None:
    try:
        alive.ask("Hi", **{"max_tokens": 2, **options})
    except qwq_lite.QwqError as error:
        assert next(iter(options)) in str(error)
    else:
        assert options == {"stop": ["\ud800"]}  # half a character never comes, and harms nobody


LOADS: list[dict[str, Any]] = [
    {"n_threads": 0},
    {"n_threads": -1},
    {"n_threads": 100_000},
    {"n_ctx": 0},
    {"n_ctx": -1},
    {"n_ctx": 1 << 40},
    {"n_ctx": True},
    {"n_gpu_layers": 1 << 40},
    {"n_gpu_layers": -2},
    {"type_k": "f99"},
    {"type_k": "q4_0\0"},
    {"host_weights": "nowhere"},
    {"memory": -1},
    {"idle_unload": 0},
    {"idle_unload": math.nan},
]


@pytest.mark.parametrize("options", LOADS, ids=str)
def test_a_load_that_cannot_be_meant(demo_gguf: Path, options: dict[str, Any]) -> None:
    with pytest.raises(qwq_lite.UsageError, match=next(iter(options))):
        qwq_lite.load(demo_gguf, **options).unload()


@pytest.mark.parametrize("options", [{"n_ctx": 1 << 24, "memory": 1 << 30}, {"memory": 1}], ids=str)
def test_a_context_that_does_not_fit(demo_gguf: Path, options: dict[str, Any]) -> None:
    """The message says what it needs, what is free and what is missing."""
    with pytest.raises(qwq_lite.PlanError, match=r"\d\.\d of \d\.\d GiB: \d+\.\d GiB too much"):
        qwq_lite.load(demo_gguf, **options).unload()


TEXTS = {
    "NUL": "\0",
    "NUL within": "a\0b",
    "half a pair": "\ud800",
    "the last character": "\U0010ffff" * 100,
    "words": "word " * 200_000,
    "one word": "a" * 1_000_000,
    "digits": "1" * 1_000_000,
    "white space": " " * 1_000_000,
    "accents": "e" + "\u0301" * 500_000,
    "control tokens": "<|im_end|>" * 100_000,
}


@pytest.mark.parametrize("name", sample(TEXTS, 3))
def test_texts_that_are_none(alive: qwq_lite.Model, name: str) -> None:
    text = TEXTS[name]
    assert alive.tokenize(text)
    for use in (alive.ask, lambda text, **options: list(alive.generate(text, max_tokens=options["max_tokens"]))):
        try:
            use(text, max_tokens=2, when_full="error")
        except qwq_lite.ContextFull:
            assert len(text) > 1000


@posix
def test_those_who_wait_outlive_a_death(letters_gguf: Path) -> None:
    with qwq_lite.load(letters_gguf, n_ctx=2048) as model:
        streams = [model.generate("Hi", max_tokens=1500) for _ in range(4)]
        psutil.Process(model.pid).kill()  # type: ignore[attr-defined]
        for stream in streams:
            done = list(stream)[-1]
            assert isinstance(done, qwq_lite.Done)
            assert done.reply.answer
        assert model.ask("Hi", max_tokens=2).stats.n_generated


def test_four_threads_on_one_model(alive: qwq_lite.Model) -> None:
    replies: list[qwq_lite.Reply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(alive.ask("Hi", max_tokens=20, temperature=0.0)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({reply.answer for reply in replies}) == 1
    assert len(replies) == 4


def test_use_after_unload(demo_gguf: Path) -> None:
    model = qwq_lite.load(demo_gguf, n_ctx=512)
    chat = model.chat()
    model.unload()
    for use in (lambda: chat.ask("Hi"), lambda: model.tokenize("Hi"), chat.fork, lambda: chat.save("x")):
        with pytest.raises(qwq_lite.EngineClosed):
            use()


def test_paths_that_are_no_model(tmp_path: Path, demo_gguf: Path) -> None:
    paths = [tmp_path, tmp_path / "none.gguf", Path("a\0b"), Path("\ud800.gguf"), Path("x" * 5000)]
    data = demo_gguf.read_bytes()
    for n_bytes in (0, 3, 24, 1_000_000, len(data) - 1):
        paths.append(tmp_path / f"first-{n_bytes}.gguf")
        paths[-1].write_bytes(data[:n_bytes])
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "fifo.gguf")
        (tmp_path / "link.gguf").symlink_to("link.gguf")
        paths += [tmp_path / "fifo.gguf", tmp_path / "link.gguf", Path("/dev/zero"), Path("/dev/null")]
    for path in paths:
        error = error_of(lambda path=path: qwq_lite.load(path))  # type: ignore[misc]
        assert isinstance(error, qwq_lite.FormatError), path
        assert path.name in str(error)


def test_saved_states_that_were_cut_or_changed(alive: qwq_lite.Model, tmp_path: Path) -> None:
    chat = alive.chat()
    chat.ask("Hi", max_tokens=5)
    chat.save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    cut = [whole[:n] for n in (0, 8, 47, 48, 100, len(whole) // 2, -1)]
    changed = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in (0, 8, 16, 48, len(whole) // 2, -2)]
    for data in (*cut, *changed, whole + b"\0"):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(qwq_lite.FormatError, match="bad"):
            qwq_lite.Chat.restore(alive, tmp_path / "bad")
    assert qwq_lite.Chat.restore(alive, tmp_path / "state").messages == chat.messages


@posix
def test_places_where_no_state_can_be(alive: qwq_lite.Model, tmp_path: Path) -> None:
    chat = alive.chat()
    chat.ask("Hi", max_tokens=2)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "no" / "folder", Path("/dev/full"), tmp_path / ("x" * 300)):
        for use, kind in (
            (chat.save, qwq_lite.OutputError),
            (lambda path: qwq_lite.Chat.restore(alive, path), qwq_lite.FormatError),
        ):
            error = error_of(lambda use=use, path=path: use(path))  # type: ignore[misc]
            assert isinstance(error, kind), path
            assert path.name in str(error)


@posix
def test_a_file_that_is_cut_while_it_is_mapped(alive: qwq_lite.Model, demo_gguf: Path, tmp_path: Path) -> None:
    """The system ends who reads beyond: SIGBUS. Another model does not notice."""
    file = tmp_path / "model.gguf"
    file.write_bytes(demo_gguf.read_bytes())
    with qwq_lite.load(file, n_ctx=512, host_weights="no-repack") as model:
        os.truncate(file, 1 << 20)
        with pytest.raises(qwq_lite.EngineCrashed) as caught:
            model.ask("Hi", max_tokens=5)
        assert caught.value.signal == "SIGBUS"
        assert alive.ask("Hi", max_tokens=2).stats.n_generated
        with pytest.raises(qwq_lite.FormatError, match=r"model\.gguf"):
            model.ask("Hi", max_tokens=5)
        file.write_bytes(demo_gguf.read_bytes())
        assert model.ask("Hi", max_tokens=2).stats.n_generated


LITTLE = """
import resource, sys
import qwq_lite
from qwq_lite.formats import gguf_header
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
try:
    qwq_lite.load({file!r}, n_ctx=65536)
except qwq_lite.QwqError as error:
    print(type(error).__name__, error)
"""


@posix
@pytest.mark.parametrize("mib", sample([500, 900, 1500], 1))
def test_memory_that_the_system_refuses(demo_gguf: Path, mib: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LITTLE.format(file=str(demo_gguf), limit=mib << 20)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"EngineError .*SmolLM2.* 1\.\d of \d+\.\d GiB", done.stdout), done.stdout


ABORTING = """#!{python}
import sys, threading, time
from pathlib import Path

def end():
    import ctypes
    from qwq_lite.backend import native
    while not Path({flag!r}).exists():
        time.sleep(0.01)
    ggml_abort = native.symbol("ggml_abort", None, [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p])
    ggml_abort(b"planted.c", 7, b"the sea is dry")

code = sys.argv[2].split("; ", 2)
exec("; ".join(code[:2]))
threading.Thread(target=end, daemon=True).start()
exec(code[2])
"""


@posix
def test_a_failed_assertion_of_ggml(letters_gguf: Path, tmp_path: Path, debuggers: Path) -> None:
    flag, python = tmp_path / "now", tmp_path / "python"
    python.write_text(ABORTING.format(python=sys.executable, flag=str(flag)))
    python.chmod(0o755)
    texts = []
    with qwq_lite.load(letters_gguf, n_ctx=2048, python=str(python)) as model:
        with pytest.raises(qwq_lite.EngineCrashed) as caught:
            for event in model.chat().stream("Tell me a long story.", max_tokens=1500):
                if isinstance(event, qwq_lite.Answer):
                    texts.append(event.text)
                    if len(texts) == 5:  # the engine waits for its reader until then
                        flag.touch()
                        deadline = time.monotonic() + WAIT_S
                        while model.pid is not None and time.monotonic() < deadline:  # type: ignore[attr-defined]
                            time.sleep(0.01)
        crash = caught.value
        assert crash.signal == "SIGABRT"
        assert "the sea is dry" in crash.assertion
        assert "the sea is dry" in str(crash)
        assert crash.partial.startswith("".join(texts))
        assert not list(debuggers.iterdir())
        flag.unlink()
        assert model.ask("Hi", max_tokens=2).stats.n_generated
