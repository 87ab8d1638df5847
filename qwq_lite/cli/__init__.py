"""The command `qwq-lite`: one module a command, loaded when it is called."""

from __future__ import annotations

import importlib

import click

from qwq_lite._version import __version__
from qwq_lite.cli import console

_COMMANDS = {
    "chat": ("qwq_lite.cli.chat", "Talk to a model."),
    "convert": ("qwq_convert.cli.convert", "Turn a Hugging Face checkpoint into GGUF files."),
    "verify": ("qwq_convert.cli.verify", "Say whether a converted file is what it was, byte for byte."),
    "inspect": ("qwq_convert.cli.inspect", "Say what a model file or a checkpoint holds."),
    "plan": ("qwq_lite.cli.plan", "Say what a model takes here, before it is downloaded."),
    "doctor": ("qwq_lite.cli.doctor", "Say what this installation can do, and what is wrong with it."),
}


class _LazyGroup(click.Group):
    """Lists commands without importing them: --help takes no second, and numpy only loads where it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qwq-lite")
def commands() -> None:
    """Convert, check and run QwQ-32B on hardware that people own."""


def main() -> None:
    """Entry point: the error tree becomes one line and an exit status, here and nowhere else."""
    console.run(commands)
