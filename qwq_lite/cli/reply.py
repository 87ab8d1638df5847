"""One reply on the terminal: the answer on standard output, the thought and all else beside it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable

import click

from qwq_lite.cli import console
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Thinking, ThoughtEnd

_ENDINGS = {
    "length": "stopped at its limit, ",
    "cancelled": "stopped, ",
    "context": "the context is full, ",
    "deadline": "ended by --within, ",
    "loop": "ended, for it repeated itself, ",
}
_THOUGHT_ENDS: dict[ThoughtEnd, str] = {
    "itself": "",
    "budget": ", ended by its budget",
    "deadline": ", ended by --within",
    "asked": ", ended for the answer",
    "context": ", ended for want of room",
    "loop": ", ended in a loop",
}


def show(events: Iterable[Event], *, thinking: bool, said: set[str]) -> Reply:
    """Print a reply as it comes. An answer that only the whole text shows is printed at the end.

    Args:
        thinking: the thought too, dimmed on a terminal and to stderr otherwise; else a count of it.
        said: notices of ignored options that were printed before; they are the same for each reply of a conversation.
    """
    to_terminal = sys.stdout.isatty()
    meter = _Meter(shown=not thinking and sys.stderr.isatty())
    n_printed = 0
    beside = ""  # the end of a thought that goes to standard error
    for event in events:
        if isinstance(event, Answer):
            meter.clear()
            text = console.printable(event.text)
            n_printed += len(text.strip())
            click.echo(text, nl=False)
        elif isinstance(event, Thinking):
            if thinking:
                text = console.printable(event.text)
                click.secho(text, nl=False, dim=True, err=not to_terminal)
                beside = "" if to_terminal else text[-1:]
        elif isinstance(event, Progress):
            meter.update(event)
        elif isinstance(event, Notice):
            if event.kind == "ignored" and event.text in said:
                continue
            said.add(event.text)
            meter.clear()
            console.note(f"\n{event.text}")
            beside = ""
        elif isinstance(event, Done):
            meter.clear()
            reply = event.reply
            seen = n_printed or (thinking and to_terminal and not reply.thinking)
            if not seen:
                click.echo(console.printable(reply.answer), nl=False)
            click.echo()
            if beside.strip("\n"):
                click.echo(err=True)
            _summary(reply)
            return reply
    raise AssertionError("a stream ends with Done")


def exit_status(reply: Reply) -> int:
    """Of a program that asked this question. Says why there is no answer."""
    if reply.finish_reason == "cancelled":
        return console.INTERRUPTED
    if reply.answer or not reply.thinking:
        return 0
    if reply.finish_reason == "stop":
        console.warn("the model ended its turn after the thought, without an answer")
    else:
        console.warn(
            f"the thought used the room of {reply.stats.n_thinking} tokens and left none for an answer;"
            " --think-budget or --effort ends it in time, --ctx and --max-tokens give it more"
        )
    return console.NO_ANSWER


def _summary(reply: Reply) -> None:
    stats = reply.stats
    thought = ""
    if stats.n_thinking:
        end = _THOUGHT_ENDS[stats.thought_end] if stats.thought_end else ""
        thought = f" (thought {stats.n_thinking}{end}; answer {stats.n_answer})"
    left = (
        ""
        if stats.time_left_s is None
        else f", {abs(stats.time_left_s):.1f} s {'left' if stats.time_left_s >= 0 else 'over'}"
    )
    done = f"; loops: {', '.join(stats.loops)}" if stats.loops else ""
    if stats.n_refused:
        done += f"; {stats.n_refused} tokens of another script refused"
    console.note(
        f"{_ENDINGS.get(reply.finish_reason, '')}{stats.n_generated} tokens{thought} at {stats.decode_tok_s:.1f} tok/s{left}"
        f"{done}; prompt {stats.n_prefilled} new + {stats.n_reused} kept in {stats.prefill_s:.1f} s;"
        f" context {stats.n_kv} of {stats.n_ctx}"
    )


class _Meter:
    """A line on stderr that counts a thought which is not shown."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._width = shown, 0
        self._began: float | None = None
        self._n_first = 0.0

    def update(self, event: Progress) -> None:
        if not self._shown or event.stage != "thinking":
            return
        now = time.monotonic()
        if self._began is None:
            self._began, self._n_first = now, event.done
        speed = (event.done - self._n_first) / (now - self._began) if now > self._began else 0.0
        text = f"thinking: {event.done:.0f} of at most {event.total:.0f} tokens" + (
            f", {speed:.1f} tok/s" if speed else ""
        )
        text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be taken back
        click.secho(f"\r{text.ljust(self._width)}", err=True, dim=True, nl=False)
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            click.echo(f"\r{' ' * self._width}\r", err=True, nl=False)
            self._width = 0
