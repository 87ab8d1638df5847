"""Scripts whose letters an answer may be kept free of: which characters they are. Pure, a table.

They are those that the models mix in: Han, with the letters for its sounds (bopomofo), kana, Hangul, Cyrillic, Arabic, Hebrew and
Thai. Latin and Greek, and what all scripts share (digits, punctuation, signs, emoji), belong to none of them, nor does any other
script, such as Devanagari, Armenian, Georgian or Tibetan: its letters are never masked. A range is a script's,
and reaches over code points of its block that are not assigned.
Source: Unicode 14.0, Scripts.txt; blocks that came later from Blocks.txt of 16.0
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Final

_RANGES: Final[Mapping[str, str]] = {
    "han": "2E80-2E99 2E9B-2EF3 2F00-2FD5 3005 3007 3021-3029 3038-303B 3105-312F 31A0-31BF 3400-4DBF 4E00-9FFF F900-FAFF"
    " 16FE2-16FE3 16FF0-16FF6 20000-3FFFD",
    "kana": "3041-3096 309D-309F 30A1-30FA 30FD-30FF 31F0-31FF 32D0-32FE 3300-3357 FF66-FF6F FF71-FF9D 1AFF0-1AFFF"
    " 1B000-1B16F 1F200",
    "hangul": "1100-11FF 302E-302F 3131-318E 3200-321E 3260-327E A960-A97F AC00-D7FF FFA0-FFDC",
    "cyrillic": "400-484 487-52F 1C80-1C8F 1D2B 1D78 2DE0-2DFF A640-A69F FE2E-FE2F 1E030-1E08F",
    "arabic": "600-604 606-60B 60D-61A 61C-61E 620-63F 641-64A 656-66F 671-6DC 6DE-6FF 750-77F 870-8E1 8E3-8FF"
    " FB50-FD3D FD40-FDFF FE70-FEFC 10E60-10E7E 10EC0-10EFF 1EE00-1EEFF",
    "hebrew": "591-5F4 FB1D-FB4F",
    "thai": "E01-E3A E40-E5B",
}
MASKABLE: Final = frozenset(_RANGES)
# Letters of Latin and Greek, of phonetics and of mathematics.
_OWN = (
    "41-5A 61-7A AA B5 BA C0-36F 370-3E1 3F0-3FF 1D00-1D2A 1D2C-1D77 1D79-1FFF 2071 207F 2090-209C 2100-218F 2C60-2C7F"
)
_OWN += " A720-A7FF AB30-AB6F FB00-FB06 FF21-FF3A FF41-FF5A 10780-107BF 1D400-1D7FF 1DF00-1DFFF"


def _class(ranges: str) -> str:
    """Inside of a regular expression's brackets."""
    return "".join("-".join(f"\\U{int(code, 16):08x}" for code in part.split("-")) for part in ranges.split())


@functools.cache
def characters(scripts: frozenset[str]) -> re.Pattern[str]:
    """Finds one character of any of the scripts; none of no scripts. Raises: KeyError for one that is not in MASKABLE."""
    inside = "".join(_class(_RANGES[script]) for script in sorted(scripts))
    return re.compile(f"[{inside}]" if inside else "(?!)")


_OWN_LETTER = re.compile(f"[{_class(_OWN)}]")


def has_other_letters(text: str) -> bool:
    """Whether any letter of a text is neither Latin nor Greek, of whatever script."""
    if text.isascii():
        return False
    return any(letter.isalpha() and not _OWN_LETTER.match(letter) for letter in set(text))
