"""Every module of the package but its command: most are imported by name, when they are first asked for."""

from PyInstaller.utils.hooks import collect_submodules

_NOT_IN_AN_APPLICATION = ("qwq_lite.cli", "qwq_lite.__main__", "qwq_lite._pyinstaller")

hiddenimports = [
    *collect_submodules("qwq_lite", filter=lambda name: not name.startswith(_NOT_IN_AN_APPLICATION)),
    "llama_cpp.llama_cpp",
]
