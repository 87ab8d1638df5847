"""The installer's command line, once the Python is known to be new enough."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from scripts.install_decisions import ACCELERATORS, Decision, decide
from scripts.install_facts import Facts, probe
from scripts.install_index import UPSTREAM, Index
from scripts.install_processes import say
from scripts.install_steps import Installer, InstallError, carry_out

_ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="install.py", description="Install qwq-lite for this machine's hardware.")
    parser.add_argument("--accel", choices=ACCELERATORS, default="auto", help="what the engine computes on")
    parser.add_argument("--extras", type=_extras, default=(), metavar="LIST", help="such as test,check")
    parser.add_argument(
        "--venv", type=Path, default=_ROOT / ".venv", metavar="DIR", help="default: .venv in the checkout"
    )
    parser.add_argument(
        "--index", default=UPSTREAM, metavar="URL", help=f"base of the wheels' index, default {UPSTREAM}"
    )
    parser.add_argument("--compile", action="store_true", help="compile the engine even where a wheel fits")
    parser.add_argument("--force", action="store_true", help="install the engine anew even if it is there and works")
    parser.add_argument("--dry-run", action="store_true", help="print what was found and decided, do nothing")
    return parser


def _extras(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    wrong = [name for name in names if not re.fullmatch(r"[a-z0-9]+", name)]
    if wrong:
        raise argparse.ArgumentTypeError(f"no extra is called {wrong[0]!r}")
    return names


def run(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return _run(options)
    except (InstallError, OSError, ValueError) as error:
        say("install.py: " + " ".join(str(error).split()))
        return 1
    except KeyboardInterrupt:
        say("install.py: interrupted; run it again to go on")
        return 130


def _run(options: argparse.Namespace) -> int:
    venv = options.venv.absolute()
    facts = probe(_ROOT, venv)
    index = Index(options.index, facts.system, facts.machine)
    installer = Installer(
        root=_ROOT,
        venv=venv,
        requirement=facts.requirement,
        index=index,
        asked=options.accel,
        extras=options.extras,
        force=options.force,
    )
    if not options.force:
        facts = dataclasses.replace(facts, engine=installer.look())
    decision = decide(facts, options.accel, options.compile)
    if options.dry_run:
        print(describe(facts, decision))
        return 1 if decision.fatal else 0
    for warning in decision.warnings:
        say(warning)
    print(carry_out(decision, installer, facts.engine))
    return 0


def describe(facts: Facts, decision: Decision) -> str:
    """What was found and what would be done, one fact a line."""
    lines = [f"{name.name}: {_shown(getattr(facts, name.name))}" for name in dataclasses.fields(facts)]
    lines += [f"warning: {warning}" for warning in decision.warnings]
    if decision.fatal:
        lines.append(f"cannot go on: {decision.fatal}")
    elif decision.keep:
        lines.append(decision.keep)
    else:
        lines += [
            f"attempt {i}: {attempt.label}" + (f", {attempt.duration}" if attempt.duration else "")
            for i, attempt in enumerate(decision.attempts, start=1)
        ]
        lines += [f"not attempted: {reason}" for reason in decision.left_out]
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        if len(value) == 2 and all(isinstance(part, int) for part in value):
            return ".".join(map(str, value))
        return ", ".join(map(_shown, value)) or "none"
    if value is None:
        return "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit("run scripts/install.py")
