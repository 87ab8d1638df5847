"""qwq-lite chat: one answer, or a plain conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwq_lite.chat import Chat
from qwq_lite.cli import console
from qwq_lite.errors import EngineClosed, EngineError, TemplateError, UsageError
from qwq_lite.events import Answer, Done, Notice, Progress, Reply, Thinking
from qwq_lite.model import options as check_options

if TYPE_CHECKING:
    from qwq_lite.chat import Model

_PROMPT = "> "


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Ask this, print the answer and end. `-` reads it from standard input.")
@click.option("-s", "--system", help="System prompt.")
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(256, 1 << 24), help="Context in tokens.  [default: what fits, at most 32768]"
)
@click.option("--type-k", help="Type of the K cache: f16, bf16, q8_0, q4_0.  [default: f16, or q8_0 where it must]")
@click.option("--type-v", help="Type of the V cache.  [default: that of the K cache]")
@click.option(
    "--gpu-layers", "n_gpu_layers", type=click.IntRange(-1), help="Layers on the GPU.  [default: as many as fit]"
)
@click.option(
    "--host-weights",
    help="Where weights of host layers lie: mmap, no-repack, pinned, repacked.  [default: mmap]",
)
@click.option(
    "--threads", "n_threads", type=click.IntRange(1), help="CPU threads.  [default: one core less than there are]"
)
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answer.  [default: random]")
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="End an answer after so many tokens.")
@click.option("--stop", multiple=True, help="End an answer where this text begins. May be given several times.")
@click.option(
    "--when-full",
    type=click.Choice(["drop", "error"]),
    default="drop",
    show_default=True,
    help="When a conversation no longer fits the context: leave out its oldest turns, with a notice; or refuse.",
)
@click.option("--temperature", type=click.FloatRange(0), help="0 takes the likeliest token.  [default: the file's]")
@click.option("--top-k", type=click.IntRange(0), help="Sample among so many tokens; 0 for all.  [default: the file's]")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling; 1 for off.  [default: the file's]"
)
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="Least share of the best token's chance.  [default: the file's]"
)
def command(
    model: Path,
    prompt: str | None,
    system: str | None,
    n_ctx: int | None,
    type_k: str | None,
    type_v: str | None,
    n_gpu_layers: int | None,
    host_weights: str | None,
    n_threads: int | None,
    **options: Any,
) -> None:
    """Talk to MODEL, any text model in GGUF that llama.cpp runs.

    \b
    Ctrl-C stops the answer, not the program; Ctrl-D ends it. The answer goes to standard output, all else to
    standard error.

    Example: qwq-lite chat QwQ-32B-Preview-Q4_K_M.gguf -p "How many r are in strawberry?"
    """
    from qwq_lite.loading import load

    check_options(options)  # before a large file is loaded
    question = sys.stdin.read() if prompt == "-" else prompt
    if question is not None and not question.strip():
        raise UsageError("--prompt is empty; give it a question, or leave it out to converse")
    if type_k and type_v and type_k.lower() != type_v.lower():
        console.warn("--type-k and --type-v differ: CUDA builds then compute attention on the CPU, many times slower")
    with _load_bar() as bar:
        loaded = load(
            model,
            n_ctx=n_ctx,
            type_k=type_k,
            type_v=type_v,
            n_gpu_layers=n_gpu_layers,
            host_weights=host_weights,
            n_threads=n_threads,
            on_progress=bar,
        )
    with loaded:
        _say_where(loaded)
        chat = loaded.chat(system)
        with console.Interrupts(chat.cancel) as interrupts:
            if question is not None:
                if _answer(chat, question, options).finish_reason == "cancelled":
                    raise click.exceptions.Exit(console.INTERRUPTED)
            else:
                _converse(chat, interrupts, options)


def _converse(chat: Chat, interrupts: console.Interrupts, options: dict[str, Any]) -> None:
    for text in _questions(interrupts):
        try:
            _answer(chat, text, options)
        except (EngineError, TemplateError) as error:  # a question that does not fit ends itself, not the chat
            if isinstance(error, EngineClosed) or not sys.stdin.isatty():
                raise
            console.warn(console.one_line(str(error)))


def _say_where(model: Model) -> None:
    """The device that answers; and loudly, the GPU that could and does not."""
    from qwq_lite import diagnosis

    engine = model.engine
    for finding in diagnosis.unusable_gpu(diagnosis.look(Path.cwd()), engine):
        console.warn(f"{finding.text}\nTo mend it: {finding.command}")
    used = [device for device in engine.gpus if device.name in model.plan.footprint.devices]
    names = ", ".join(f"{device.name} ({device.description})" for device in used or engine.devices[-1:])
    console.note(f"running on {names}: {model.plan.line()}")
    for notice in model.notices:
        console.note(notice)


def _questions(interrupts: console.Interrupts) -> Iterator[str]:
    """Lines from the terminal until end of file; Ctrl-C drops the line being typed."""
    interactive = sys.stdin.isatty()
    if interactive:
        console.note("Ctrl-C stops an answer, Ctrl-D ends the chat.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
    while True:
        try:
            with interrupts.reading():
                line = _read_line() if interactive else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        if line.strip():
            yield line


def _read_line() -> str:
    """A line typed at the prompt, which is no part of the answers when those go to a file."""
    if sys.stdout.isatty():
        return input(_PROMPT)
    click.echo(_PROMPT, nl=False, err=True)
    return input()


def _answer(chat: Chat, text: str, options: dict[str, Any]) -> Reply:
    """Stream one reply: the answer to stdout, the thought dimmed on a terminal and to stderr otherwise."""
    to_terminal = sys.stdout.isatty()
    for event in chat.stream(text, **options):
        if isinstance(event, Answer):
            click.echo(console.printable(event.text), nl=False)
        elif isinstance(event, Thinking):
            click.secho(console.printable(event.text), nl=False, dim=True, err=not to_terminal)
        elif isinstance(event, Notice):
            console.note(f"\n{event.text}")
        elif isinstance(event, Done):
            click.echo()
            _summary(event.reply)
            return event.reply
    raise AssertionError("a stream ends with Done")


def _summary(reply: Reply) -> None:
    stats = reply.stats
    endings = {"length": "stopped at --max-tokens, ", "cancelled": "stopped, ", "context": "the context is full, "}
    console.note(
        f"{endings.get(reply.finish_reason, '')}{stats.n_generated} tokens at {stats.decode_tok_s:.1f} tok/s;"
        f" prompt {stats.n_prefilled} new + {stats.n_reused} kept in {stats.prefill_s:.1f} s"
    )


class _load_bar:  # noqa: N801 - used like a function
    """A bar on stderr while weights are read; nothing when stderr is no terminal."""

    def __enter__(self) -> _load_bar:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("loading", total=1.0)
        self._bar.start()
        return self

    def __call__(self, event: Progress) -> None:
        self._bar.update(self._task, completed=event.done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
