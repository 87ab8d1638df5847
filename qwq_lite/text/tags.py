"""Which user-defined tokens of a vocabulary are tags: they part thoughts, turns and tool calls. Pure.

A tag is a name in brackets: `<think>`, `</tool_call>`, `<|end|>`, `<｜User｜>`, `<start_of_turn>`, `[INST]`. Everything else is
ordinary text that has a token of its own: white space (GPT-NeoX, MPT, Gemma 3), letters (DeepSeek's `ö`) and HTML (Gemma 3).
`<s>` and `</s>` are HTML too, unless one of them is a control token, as in Phi-3.

It does not know what a model's template does with a tag.
"""

from __future__ import annotations

import re
from collections.abc import Collection

THINK_TAGS = ("<think>", "</think>")  # what models write where a thought begins and ends
_TAG = re.compile(r"<(?=[^<>]*(?:[^\W\d_]|[|｜]))[^<>\s]+>|\[(?=[^\[\]]*[^\W\d_]{2})[^\[\]\s]+\]")
# Elements of HTML that mark up text. Those whose name is also a medium's or a tool's (audio, search, output) are tags.
_NAMES = (
    "a abbr address article aside b bdi bdo big blockquote body br button caption center cite code col colgroup dd del details"
    " dfn div dl dt em fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins"
    " kbd label legend li link main mark meta nav ol optgroup option p pre q rp rt ruby s samp script section select small"
    " span strike strong style sub summary sup svg table tbody td textarea tfoot th thead time title tr tt u ul var wbr"
    " !doctype"
)
_HTML = frozenset(_NAMES.split(" "))


def find_tags(user_defined: Collection[str], control: Collection[str]) -> list[str]:
    """Those user-defined spellings that are tags. control: the spellings of the vocabulary's control tokens."""
    marks = {_name(spelling) for spelling in control}
    html = _HTML - marks
    return [spelling for spelling in user_defined if _TAG.fullmatch(spelling) and _name(spelling) not in html]


def _name(spelling: str) -> str:
    """What is between the brackets, without the slash of an end."""
    return spelling[1:-1].strip("/").casefold()
