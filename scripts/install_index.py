"""Upstream's wheel index: asked once for each name before pip is, so that a silent one costs seconds.

An answer settles what pip need not be asked; no answer settles nothing, since pip may know a proxy or certificates
that urllib does not. Then pip asks, and if it gets none either, the index is not asked again.
"""

from __future__ import annotations

import http.client
import queue
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from scripts.install_decisions import satisfies

UPSTREAM = "https://abetlen.github.io/llama-cpp-python/whl"
INDEX_TIMEOUT_S = 4
_MAX_BYTES = 4 << 20
_TAGS = {"linux": "linux", "darwin": "macosx", "win32": "win"}
_MACHINES = {"x86_64": ("x86_64", "amd64"), "arm64": ("arm64", "aarch64")}
_SILENT = "the index of wheels does not answer"


def fetch(url: str, timeout_s: float) -> str | None:
    """The page's text, "" when it is not there (404), None without an answer in time.

    A thread, because urllib's timeout bounds neither the look-up of the name nor a server that sends byte by byte.
    """
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                text = response.read(_MAX_BYTES).decode("utf-8", "replace")
                answer.put(None if getattr(response, "length", 0) else text)  # what is left: it broke off
        except urllib.error.HTTPError as error:
            with error:
                answer.put("" if error.code == 404 else None)
        except (OSError, ValueError, http.client.HTTPException):
            answer.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=2 * timeout_s)
    except queue.Empty:
        return None


@dataclass
class Index:
    """One base address; its pages are BASE/NAME/llama-cpp-python/."""

    base: str
    system: str
    machine: str
    fetch: Callable[[str, float], str | None] = fetch
    _unanswered: set[str] = field(default_factory=set)
    _silent: bool = False

    def page(self, name: str) -> str:
        return f"{self.base.rstrip('/')}/{name}/llama-cpp-python/"

    def absent(self, name: str, requirement: str) -> str | None:
        """Why this name has no wheel for this machine; None when it has one, or did not say."""
        if self._silent:
            return _SILENT
        text = self.fetch(self.page(name), INDEX_TIMEOUT_S)
        if text is None:
            self._unanswered.add(name)
            return None
        if any(self._fits(wheel, requirement) for wheel in re.findall(r"""href\s*=\s*["']([^"']+)""", text)):
            return None
        return f"the index has no wheel {name} of llama-cpp-python{requirement} for {self.system} on {self.machine}"

    def explain(self, name: str, pip_said: str) -> str:
        """The reason for a wheel that pip did not get. Two silences in a row are the index's, not pip's."""
        if name not in self._unanswered:
            return pip_said
        self._silent = True
        return _SILENT

    def _fits(self, href: str, requirement: str) -> bool:
        file = urllib.parse.unquote(urllib.parse.urlsplit(href).path).rpartition("/")[2]
        match = re.fullmatch(r"llama_cpp_python-([^-]+)-(?:[^-]+-)+([^-]+)\.whl", file)
        if match is None or not satisfies(match[1], requirement):
            return False
        tag = match[2].lower()
        right_machine = any(
            tag.endswith(name) for name in (*_MACHINES.get(self.machine, (self.machine,)), "universal2")
        )
        return tag == "any" or (_TAGS.get(self.system, self.system) in tag and right_machine)
