"""Install qwq-lite for this machine's hardware: a virtual environment, the right llama.cpp, the project itself.

    python3 scripts/install.py                   Windows: py scripts\\install.py
    python3 scripts/install.py --dry-run         only say what was found and what would be done

This file holds the command line. It must still be read by a Python too old for the rest (3.6 on), to say so in one
line: no annotation here is evaluated and everything else is imported after the version is known. What is decided is in
install_decisions, what was found in install_facts, what is done in install_steps.
"""

import os
import sys
import types

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - read before the version is known


def old_python(version: "tuple[int, ...]", executable: str) -> "str | None":
    """One line for a Python that qwq-lite does not run on, None for one that it does."""
    if version[:2] >= (3, 10):
        return None
    found = ".".join(str(part) for part in version[:3])
    hint = " (macOS ships 3.9; python.org and Homebrew have newer ones)" if sys.platform == "darwin" else ""
    retry = "py -3.12 scripts\\install.py" if os.name == "nt" else "python3.12 scripts/install.py"
    return "qwq-lite needs Python 3.10 or newer, {} is {}{}: run {}".format(executable, found, hint, retry)  # noqa: UP032


def main(arguments: "list[str] | None" = None) -> int:
    """The exit status: 0, 1 with one line on stderr, 2 for a command line that is not understood."""
    too_old = old_python(tuple(sys.version_info[:3]), sys.executable)
    if too_old:
        sys.stderr.write(too_old + "\n")
        return 1
    sys.path.insert(0, os.path.dirname(_HERE))  # noqa: PTH120 - qwq_lite of this checkout: its check of an engine
    # The folder is the package `scripts`, whatever else of that name is installed.
    package = types.ModuleType("scripts")
    package.__path__ = [_HERE]
    sys.modules.setdefault("scripts", package)
    from scripts.install_cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
