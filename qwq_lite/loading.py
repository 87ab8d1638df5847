"""`load`: a model, by default with its engine in a process of its own."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from qwq_lite import arguments
from qwq_lite.chat.model import Model
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import UsageError
from qwq_lite.events import Progress
from qwq_lite.plan.run_plan import RunPlan
from qwq_lite.prompt import chat_template
from qwq_lite.prompt.template import MAX_SOURCE
from qwq_lite.store import catalog
from qwq_lite.system import child
from qwq_lite.system.files import RandomAccessFile

_MOST_BYTES = 4  # of a character in UTF-8


def load(
    model: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    type_k: str | None = None,
    type_v: str | None = None,
    n_gpu_layers: int | None = None,
    host_weights: str | None = None,
    plan: RunPlan | None = None,
    memory: int | None = None,
    n_threads: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    isolated: bool = True,
    idle_unload: float | None = None,
    python: str | None = None,
) -> Model:
    """Load a GGUF file, any text model that llama.cpp runs.

    Args:
        model: the file.
        n_ctx: tokens of context, shared by all conversations; default what the plan finds room for, at most the model's own
            and 32,768.
        type_k, type_v: type of the KV cache: f16, bf16, q8_0, q4_0; default f16, or q8_0 where it must. Give both the same.
        n_gpu_layers: layers on the GPU where there is one, -1 for all; default as many as fit.
        plan: what `plan_model` found before, in place of a plan of its own and of the arguments above. Where it no longer fits
            what is free, another is used and `Model.notices` says so.
        memory: bytes to use, of the GPU where there is one, else of main memory; default what is free.
        host_weights: where weights of host layers lie: mmap (the default), no-repack, pinned or repacked, as `plan` explains.
        n_threads: default the cores that the process may use; of a whole machine one less, for the desktop.
        chat_template: a file with a Jinja template, or "chatml", in place of the model's own; for a model that has none, or
            a wrong one. It is read once, here.
        on_progress: called with load progress, on this thread; what it raises ends the loading.
        isolated: run the engine in a process of its own, which may crash without harm: calls then raise EngineCrashed, and the
            next call starts another. False runs it here, where a failed assertion in llama.cpp ends this program.
        idle_unload: seconds without a call or a reply after which the worker ends and gives its memory back; the next call loads
            again, with on_progress on its thread, and computes what was cached anew. None keeps it.
        python: the interpreter of that process; for programs that embed Python and whose sys.executable is something else;
            with isolated=True only.

    Raises: FormatError for a file that is no GGUF model; PlanError when nothing fits the memory; EngineError when llama.cpp
    cannot load it; TemplateError for a chat template that does not parse; UsageError.

    Example:
        with qwq_lite.load("QwQ-32B-Preview-Q4_K_M.gguf") as model:
            print(model.ask("What is 2+3?").answer)
    """
    _check_no_name(model)
    template = None if chat_template is None else _template(chat_template)
    file, idle_s = _absolute(model), _check_process(isolated, idle_unload, python)
    options = LoadOptions(n_ctx, type_k, type_v, n_gpu_layers, host_weights, plan, memory, n_threads, template=template)
    if not isolated:
        from qwq_lite.engine import local

        return local.load(file, options, on_progress)
    from qwq_lite.worker import remote

    return remote.RemoteModel(file, options, python=_absolute_program(python), idle_s=idle_s, on_progress=on_progress)


def _check_process(isolated: bool, idle_unload: float | None, python: str | None) -> float:
    """Seconds after which an idle worker ends. Raises: UsageError for what does not go with the process that is asked for."""
    if idle_unload is not None:
        idle_unload = arguments.check_real("idle_unload", idle_unload)
    if idle_unload is not None and (not isolated or not idle_unload > 0):
        raise UsageError(f"idle_unload is {idle_unload!r}; seconds above 0 are allowed, with isolated=True")
    if not isolated and python is not None:
        raise UsageError("python is given, and isolated is False: no process of its own is started; leave out one")
    if isolated and child.is_child():
        raise UsageError(
            "this process is an engine's own, and such a one starts none: a frozen application calls"
            " qwq_lite.run_worker_if_asked() first thing in its main script; elsewhere give isolated=False"
        )
    return math.inf if idle_unload is None else idle_unload


def _template(given: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a template that a user names, and what its errors begin with. Raises: UsageError."""
    what = "chat_template (--chat-template)"
    if not isinstance(given, str | os.PathLike) or not str(given):
        raise UsageError(f"{what} is {given!r}; give a file with a template, or chatml")
    if str(given).casefold() == "chatml":
        return chat_template.CHATML, "chatml"
    try:
        with RandomAccessFile(Path(given)) as file:
            raw = bytearray(min(file.size(), MAX_SOURCE * _MOST_BYTES + 1))
            file.read_into(memoryview(raw), 0)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{given}: {what} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{given}: {what} cannot be read: {reason}; give a file with a template, or chatml") from error
    if not text.strip():
        raise UsageError(f"{given}: {what} is an empty file; give one with a template, or chatml")
    return text, str(given)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """A path that stays the same file when the program changes its folder: the engine may have to load again."""
    with contextlib.suppress(OSError):  # the current folder was deleted, and a relative path leads nowhere
        return Path(path).absolute()
    return Path(path)


def _absolute_program(python: str | None) -> str | None:
    """The same of an interpreter; a name without a folder is looked for in PATH."""
    return str(_absolute(python)) if python is not None and Path(python).name != python else python


def _check_no_name(model: str | os.PathLike[str]) -> None:
    """Raises: UsageError for nothing, and for a model of the catalogue, which is no file yet."""
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"model is {model!r}; the path of a .gguf file is expected")
    name = os.fspath(model)
    if not name:
        raise UsageError("model is empty; give the path of a .gguf file")
    if os.path.lexists(name):
        return
    advice = catalog.how_to_get(name)
    if advice is not None:
        raise UsageError(f"{name}: {advice}")
