"""Made-up transcripts in the manner of QwQ-32B and QwQ-32B-Preview, each with the place where its final answer begins.

Texts are in data/transcripts, one a file. The labels were set by reading the texts, before and apart from any rule in the
code. The character ‖ is the label and no part of the text; a text holds at most one. A note in index.json says why a label is
open to argument.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).with_name("data") / "transcripts"


class Transcript(NamedTuple):
    """One text and its label."""

    name: str
    tagged: bool  # QwQ-32B, whose thought ends with </think>; False: Preview, which writes no tags
    marked: str  # ‖ stands where the final answer begins; no ‖: no boundary, all is the answer
    ended: bool = True  # the model ended its turn; False: cut by a limit (tagged without ‖: cut while it thought)
    causal: bool = False  # Preview: a heading line of its own or a \boxed display at ‖; a stream could switch there


def read(name: str, labels: dict[str, Any]) -> Transcript:
    marked = (FOLDER / f"{name}.txt").read_bytes().decode("utf-8")  # line ends as they are
    return Transcript(name, labels["tagged"], marked, labels.get("ended", True), labels.get("causal", False))


TRANSCRIPTS = tuple(
    read(name, labels) for name, labels in json.loads((FOLDER / "index.json").read_text("utf-8")).items()
)
