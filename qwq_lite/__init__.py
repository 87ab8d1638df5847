"""Run QwQ-32B, and any GGUF text model, on hardware that people own.

    import qwq_lite

    with qwq_lite.load("QwQ-32B-Preview-Q4_K_M.gguf") as model:
        for event in model.chat().stream("What is 2+3?"):
            if isinstance(event, qwq_lite.Answer):
                print(event.text, end="", flush=True)

Importing this package loads neither numpy nor llama.cpp; `load` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwq_lite._version import __version__ as __version__

if TYPE_CHECKING:
    from qwq_lite.chat.chat import Chat
    from qwq_lite.chat.model import Model
    from qwq_lite.errors import (
        CheckpointError,
        ContextFull,
        EngineClosed,
        EngineCrashed,
        EngineError,
        FormatError,
        OutputError,
        PlanError,
        QwqError,
        RequestCrashed,
        TemplateError,
        UsageError,
    )
    from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Stats, Thinking
    from qwq_lite.loading import load
    from qwq_lite.plan.planning import Planned, plan_model
    from qwq_lite.plan.run_plan import RunPlan, Wishes
    from qwq_lite.reply.stream import Stream
    from qwq_lite.system.child import run_worker_if_asked

_HOMES = {
    "chat.chat": ("Chat",),
    "chat.model": ("Model",),
    "errors": (
        "CheckpointError",
        "ContextFull",
        "EngineClosed",
        "EngineCrashed",
        "EngineError",
        "FormatError",
        "OutputError",
        "PlanError",
        "QwqError",
        "RequestCrashed",
        "TemplateError",
        "UsageError",
    ),
    "events": ("Answer", "Done", "Event", "Notice", "Progress", "Reply", "Stats", "Thinking"),
    "loading": ("load",),
    "plan.planning": ("Planned", "plan_model"),
    "plan.run_plan": ("RunPlan", "Wishes"),
    "reply.stream": ("Stream",),
    "system.child": ("run_worker_if_asked",),
}
__all__ = [
    "Answer",
    "Chat",
    "CheckpointError",
    "ContextFull",
    "Done",
    "EngineClosed",
    "EngineCrashed",
    "EngineError",
    "Event",
    "FormatError",
    "Model",
    "Notice",
    "OutputError",
    "PlanError",
    "Planned",
    "Progress",
    "QwqError",
    "Reply",
    "RequestCrashed",
    "RunPlan",
    "Stats",
    "Stream",
    "TemplateError",
    "Thinking",
    "UsageError",
    "Wishes",
    "load",
    "plan_model",
    "run_worker_if_asked",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"qwq_lite.{module}"), name)
    raise AttributeError(f"module 'qwq_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
