"""What applications and scripts rely on: the names of the package, what they take, and the options of the command."""

from __future__ import annotations

import dataclasses
import inspect

import click
import pytest

import qwq_lite
from qwq_lite.chat.options import Options
from qwq_lite.cli import commands

NAMES = [
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
LOAD = (
    "model n_ctx type_k type_v n_gpu_layers host_weights plan memory n_threads chat_template on_progress isolated"
    " idle_unload python"
)
PLAN_MODEL = "model quant memory_bytes machine reserve_bytes n_threads wishes"
REPLY = (
    "seed max_tokens temperature top_k top_p min_p stop tools when_full thinking_budget effort within answer_reserve"
    " answer_temperature answer_top_p thought_style history answer_script think_script"
)
# By command: arguments, and options with all their spellings.
OPTIONS = {
    "chat": (
        "model -p/--prompt -s/--system --ctx --type-k --type-v --gpu-layers --host-weights --threads "
        "--chat-template --seed -n/--max-tokens --stop --when-full --think-budget --effort --within "
        "--answer-reserve --no-thinking --thought-style --history --answer-script --think-script "
        "--temperature --top-k --top-p --min-p --answer-temperature --answer-top-p"
    ),
    "convert": (
        "checkpoint -q/--type -o/--output --imatrix --output-tensor-type --token-embedding-type --pure "
        "--dry-run --report --sha256 --force -j/--threads --quiet --json"
    ),
    "verify": ("file --source -j/--threads --quiet --json"),
    "inspect": ("path --json"),
    "plan": (
        "model -q/--quant --memory --machine --ctx --type-k --type-v --gpu-layers --host-weights --threads "
        "--reserve --json"
    ),
    "doctor": ("--json"),
}


def test_public_names_are_pinned_and_all_there() -> None:
    assert qwq_lite.__all__ == NAMES
    assert all(getattr(qwq_lite, name) is not None for name in NAMES)


def test_what_the_functions_take() -> None:
    assert " ".join(inspect.signature(qwq_lite.load).parameters) == LOAD
    assert " ".join(inspect.signature(qwq_lite.plan_model).parameters) == PLAN_MODEL
    assert " ".join(field.name for field in dataclasses.fields(Options)) == REPLY


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_command(name: str) -> None:
    command = commands.get_command(click.Context(commands), name)
    assert command is not None
    options = ["/".join([*option.opts, *option.secondary_opts]) for option in command.params]
    assert " ".join(options) == OPTIONS[name]


def test_every_command_is_listed() -> None:
    assert set(commands.list_commands(click.Context(commands))) == OPTIONS.keys()
