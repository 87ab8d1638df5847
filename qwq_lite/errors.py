"""Everything that can go wrong, as one tree.

    QwqError
    ├── UsageError         the call itself: an option, a name, a path that cannot be meant   (exit status 2)
    ├── FormatError        a GGUF file or a saved state that does not follow its format
    ├── CheckpointError    a Hugging Face checkpoint that is incomplete, damaged or not of the qwen2 family
    ├── OutputError        a result that cannot be written: exists already, no room, no folder
    ├── PlanError          a choice of memory, context or offload that cannot hold
    ├── TemplateError      a chat template that cannot be rendered
    └── EngineError        llama.cpp: it is missing, does not load, or refused
        ├── EngineClosed   a model that was used after it was unloaded
        ├── EngineCrashed  the engine's process ended or hung; the next call starts another
        │   └── RequestCrashed  it ended because of this request, which is not tried again
        ├── ContextFull    messages that do not fit the context
        └── CacheFull      of `backend.context`: no room in the KV cache; `sequences` makes some, callers do not see it

A message names the file and the field, what was found, what is allowed and what to do next. The command line prints
it as one line and exits with `exit_status`.
"""

from __future__ import annotations


class QwqError(Exception):
    """Root of the tree. `exit_status` is what the command line returns for it."""

    exit_status = 1


class UsageError(QwqError):
    """The call cannot be meant as it stands."""

    exit_status = 2


class FormatError(QwqError):
    """A GGUF file or a saved state does not follow its format, or was cut or changed."""


class CheckpointError(QwqError):
    """A Hugging Face checkpoint cannot be used."""


class OutputError(QwqError):
    """A result cannot be written where it was asked for."""


class PlanError(QwqError):
    """A choice of memory, context or offload cannot hold. smaller: a model of the catalogue that would fit."""

    smaller: str | None = None


class TemplateError(QwqError):
    """A chat template cannot be rendered."""


class EngineError(QwqError):
    """llama.cpp is missing, does not load, or refused."""


class EngineClosed(EngineError):
    """The model was unloaded before this call."""


class EngineCrashed(EngineError):
    """The engine's own process ended, or was ended because it hung. The next call starts another.

    signal: its name, "" where there is none. assertion: ggml's last word. lines: the engine's last ones. partial: text of
    the reply so far, thought and answer.
    """

    signal = ""
    assertion = ""
    lines: tuple[str, ...] = ()
    partial = ""


class RequestCrashed(EngineCrashed):
    """The engine's process ended while it made this request's prompt into tokens, or twice while it made its reply.

    Other requests go on in another process, and the next call finds it. This one would end that as well.
    """


class ContextFull(EngineError):
    """The messages do not fit the context."""
