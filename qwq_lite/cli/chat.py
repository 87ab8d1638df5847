"""qwq-lite chat: one answer, or a plain conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from qwq_lite.chat.chat import Chat
from qwq_lite.chat.options import EFFORTS, ThoughtStyle, parse_options
from qwq_lite.cli import console, load_options, standard_input
from qwq_lite.cli.duration import parse_duration
from qwq_lite.cli.reply import exit_status, show
from qwq_lite.errors import EngineClosed, EngineError, TemplateError, UsageError
from qwq_lite.events import Progress
from qwq_lite.prompt.history import History
from qwq_lite.prompt.script_intent import AnswerScript

if TYPE_CHECKING:
    from qwq_lite.chat.model import Model

_PROMPT = "> "
_EFFORTS = ", ".join(f"{name} {n_tokens}" for name, n_tokens in EFFORTS.items())


@click.command(cls=console.Command, may_be_empty=("system",))
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt",
    help="Ask this, print the answer and end. What is piped in follows it; `-` reads the question from there.",
)
@click.option("-s", "--system", help="System prompt; '' for none, not the model's own either.")
@load_options.add_load_options(default_ctx="what fits")
@click.option(
    "--chat-template",
    metavar="FILE|chatml",
    help="Use this Jinja template, or ChatML, in place of the model's own, or where it has none.",
)
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answer.  [default: random]")
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="End an answer after so many tokens.")
@click.option(
    "--stop",
    multiple=True,
    help="End an answer where this text begins; of a model without tags, the whole reply. May be given several times.",
)
@click.option(
    "--when-full",
    type=click.Choice(["drop", "error"]),
    default="drop",
    show_default=True,
    help="When a conversation no longer fits the context: leave out its oldest turns, with a notice; or refuse.",
)
@click.option(
    "--think-budget",
    "thinking_budget",
    type=click.IntRange(0),
    metavar="N",
    help="End the thought after N tokens, at a good place within a tenth or 96 tokens more; 0 for no thought.",
)
@click.option("--effort", type=click.Choice([*EFFORTS]), help=f"A budget by name: {_EFFORTS} tokens.")
@click.option(
    "--within",
    type=parse_duration,
    metavar="DURATION",
    help="Have the answer so long after the question, such as 60s or 2m30s: the thought ends in time for a usual one.",
)
@click.option(
    "--answer-reserve",
    type=click.IntRange(1),
    help="Tokens of the context kept for the answer, at most half; its limit after a thought that was ended."
    "  [default: 1024]",
)
@click.option("--no-thinking", is_flag=True, help="Print the answer only; a line on standard error counts the thought.")
@click.option(
    "--thought-style",
    type=click.Choice(get_args(ThoughtStyle)),
    help="How the model marks its thought: with tags, not at all, or it does not think.  [default: the model's]",
)
@click.option(
    "--history",
    type=click.Choice(get_args(History)),
    help="What a model without tags sees of its earlier replies.  [default: all]",
)
@click.option(
    "--answer-script",
    type=click.Choice(get_args(AnswerScript)),
    help="Keeps letters of Han, kana, Hangul, Cyrillic, Arabic, Hebrew and Thai out of the answer, code aside. auto: if the"
    " question has Latin and Greek letters only and no word calls for others; latin: always; any: never; han, kana (with"
    " Han), …: all but this one. A reply without tags that does not announce its answer is let alone.  [default: auto]",
)
@click.option(
    "--think-script",
    type=click.Choice(get_args(AnswerScript)),
    help="The same of the thought. Thoughts mix languages without it; to keep to one cost another model 5.6 points of MATH-500."
    "  [default: any]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    help="0 takes the likeliest token, until a thought loops.  [default: the file's]",
)
@click.option("--top-k", type=click.IntRange(0), help="Sample among so many tokens; 0 for all.  [default: the file's]")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling; 1 for off.  [default: the file's]"
)
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="Least share of the best token's chance.  [default: the file's]"
)
@click.option("--answer-temperature", type=click.FloatRange(0), help="Temperature once the thought has ended.")
@click.option("--answer-top-p", type=click.FloatRange(0, 1, min_open=True), help="Top-p once the thought has ended.")
def command(
    model: Path,
    prompt: str | None,
    system: str | None,
    chat_template: str | None,
    no_thinking: bool,
    **options: Any,
) -> None:
    """Talk to MODEL, any text model in GGUF that llama.cpp runs.

    \b
    Ctrl-C stops the answer, not the program; Ctrl-\\ ends the thought for the answer; Ctrl-D ends the program. The
    answer goes to standard output, all else to standard error. Exit status 3: the thought left no room for an answer.
    A thought that repeats itself is taken back once, then ended for the answer; an answer that does is ended. A line says so.

    Example: qwq-lite chat QwQ-32B-Preview-Q4_K_M.gguf -p "How many r are in strawberry?"
    """
    from qwq_lite.loading import load

    wanted = {name: options.pop(name) for name in load_options.NAMES}
    parse_options(options)  # before a large file is loaded
    question = standard_input.read_all() if prompt == "-" else prompt
    if question is not None and not question.strip():
        raise UsageError("--prompt is empty; give it a question, or leave it out to converse")
    beside = standard_input.Beside() if prompt not in (None, "-") else None
    type_k, type_v = wanted["type_k"], wanted["type_v"]
    if type_k and type_v and type_k.lower() != type_v.lower():
        console.warn("--type-k and --type-v differ: CUDA builds then compute attention on the CPU, many times slower")
    with _load_bar() as bar:
        loaded = load(model, chat_template=chat_template, on_progress=bar, **wanted)
    with loaded:
        _say_where(loaded)
        if question is not None and beside is not None and (text := beside.text()).strip():
            question = f"{question}\n\n{text}"
        chat = loaded.chat(system)
        with console.Interrupts(chat.cancel, chat.conclude) as interrupts:
            if question is not None:
                status = exit_status(show(chat.stream(question, **options), thinking=not no_thinking, said=set()))
                if status:
                    raise click.exceptions.Exit(status)
            else:
                status = _converse(chat, interrupts, options, thinking=not no_thinking)
                if status and not sys.stdin.isatty():
                    raise click.exceptions.Exit(status)


def _converse(chat: Chat, interrupts: console.Interrupts, options: dict[str, Any], *, thinking: bool) -> int:
    """Answer questions until there are no more. Returns the exit status: that a question has no answer, if one has none."""
    status, said = 0, set[str]()
    for text in _questions(interrupts):
        try:
            if exit_status(show(chat.stream(text, **options), thinking=thinking, said=said)) == console.NO_ANSWER:
                status = console.NO_ANSWER
        except (EngineError, TemplateError) as error:  # a question that does not fit ends itself, not the chat
            if isinstance(error, EngineClosed) or not sys.stdin.isatty():
                raise
            console.warn(console.one_line(str(error)))
    return status


def _say_where(model: Model) -> None:
    """The device that answers; and loudly, the GPU that could and does not."""
    from qwq_lite.cli import diagnosis

    engine = model.engine
    for finding in diagnosis.unusable_gpu(diagnosis.look(Path()), engine):
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
        console.note("Ctrl-C stops an answer, Ctrl-\\ ends its thought, Ctrl-D ends the chat.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
    while True:
        try:
            with interrupts.reading():
                line = _read_line() if interactive else standard_input.read_line()
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
