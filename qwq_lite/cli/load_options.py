"""Options of the command line that say how a model is loaded: those that `chat` and `plan` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

NAMES = ("n_ctx", "type_k", "type_v", "n_gpu_layers", "host_weights", "n_threads")  # what a command gets of them


def add_load_options(*, default_ctx: str, most_threads: int | None = None) -> Callable[[Any], Any]:
    """A decorator that adds them to a command, in the order of its help.

    Args:
        default_ctx: the context without --ctx, in words.
        most_threads: None where the engine says how many it takes.
    """
    options = [
        click.option(
            "--ctx",
            "n_ctx",
            type=click.IntRange(256, 1 << 24),
            help=f"Context in tokens.  [default: {default_ctx}, at most 32768]",
        ),
        click.option(
            "--type-k", help="Type of the K cache: f16, bf16, q8_0, q4_0.  [default: f16, or q8_0 where it must]"
        ),
        click.option("--type-v", help="Type of the V cache.  [default: that of the K cache]"),
        click.option(
            "--gpu-layers",
            "n_gpu_layers",
            type=click.IntRange(-1),
            help="Layers on the GPU.  [default: as many as fit]",
        ),
        click.option(
            "--host-weights",
            help="Where weights of host layers lie: mmap, no-repack, pinned, repacked.  [default: mmap]",
        ),
        click.option(
            "--threads",
            "n_threads",
            type=click.IntRange(1, most_threads),
            help="CPU threads.  [default: the cores it may use; of all, one less]",
        ),
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):  # click lists the option that was added last first
            command = option(command)
        return command

    return add
