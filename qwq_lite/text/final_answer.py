"""Finds where the answer begins in a text without thinking tags, such as of QwQ-32B-Preview. Pure.

Of 44 real outputs of that model about half mark the answer with a heading, "**Final Answer**" before all, some with a closing
sentence, some not at all. A heading on a line of its own and a boxed result are seldom wrong while the text is still coming;
closing sentences are: "So the answer is" was followed by more thought in 12 of 44. So they count only in a text that has ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwq_lite.text.fences import fenced_lines, unclosed_start

_NOUNS = (
    r"answers?|solutions?|outputs?|results?|responses?|scores?|ratings?|rankings?|code|verdict|conclusions?|decision|choices?"
    r"|evaluations?|list|version|implementation|explanation|summary|statement|guess|clue"
)
_CHINESE = "答案|解答|回答|结果|评分|得分|分数|方案|结论|输出|代码|排名|选择|答复|解法|总结"
# A heading is Markdown's, or one bold line; a colon may stand within or after the stars. Without either it needs its colon.
_FINAL = (
    rf"(?:(?:my|the|our|a)[ ]+)?(?:final[ ]+(?:[a-z]+[ ]+)?(?:{_NOUNS})|answers?)|最[終终後后]的?(?:{_CHINESE})|答案"
)
_HEADING = re.compile(
    rf"[ \t]*(?:\#{{1,6}}[ \t]*(?:\*\*)?|\*\*)[ \t]*(?:{_FINAL})[ \t]*[:\uff1a]?[ \t]*(?P<end>(?:\*\*)?[ \t]*[:\uff1a]?)[ \t]*",
    re.IGNORECASE,
)
_PLAIN = ("final answer", "the final answer", "my final answer", "最终答案")
LONGEST_HEADING = 60  # characters; a line that is longer is none
_OPENERS = ("\\[", "$$")  # of a display, which the box may follow on the next line
_BOX = "\\boxed{"
_BOXED = re.compile(r"[ \t]*(?:(?:\\\[|\$\$?|\\\()[ \t]*\n?)?[ \t]*\\boxed\{")
_BOXED_SO_FAR = re.compile(r"(?:(?:\\[\[(]|\$\$?)[ \t]*\n?)?[ \t]*(?:\\(?:b(?:o(?:x(?:ed?)?)?)?)?)?\Z")
_CLOSING = re.compile(
    r"(?:(?:so|thus|hence|therefore|in conclusion|in summary|overall|finally|and so|ultimately)\b[, ]*)?"
    r"(?:i(?:'ll| will| would)? (?:conclude|say|answer)\b[^.\n]{0,40}?)?"
    r"(?:the|my|our)[ ](?:final |correct |best |required |only )*"
    r"(?:answers?|solution|result|options?|choice|final scores?|ratings?)\b"
    r"(?:[ ](?:here|to (?:this|the) (?:question|problem)))?[ ]?(?:is|are|would be|should be|must be|as follows|:)"
    r"|(?:因此|所以|综上所述|综上|故|总之)[，, ]*[^。\n]{0,12}?(?:答案|评分|得分|结果|结论|选项)[^。\n]{0,6}?(?:如下|为|是|：)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(r"(?:(?:therefore|thus|hence)\b|因此|综上|所以)[^\n]{1,200}\s*", re.IGNORECASE)
_DOUBT = re.compile(r"\s*(?:no\b|wait|hmm|but\b|actually|hold on|不对|不過|不过|等等|等一下|但)", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?。！？](?:[ \t]+|(?<=[。！？]))|\n+")
_TAIL, _NEAR = 0.6, 200  # a closing sentence stands in the last part of a text, or so many characters from its end


def is_heading(line: str) -> bool:
    """Whether a whole line announces the answer."""
    if len(line) > LONGEST_HEADING:
        return False
    plain = line.strip(" \t")
    return _HEADING.fullmatch(line) is not None or (plain[-1:] in ":\uff1a" and plain[:-1].rstrip().lower() in _PLAIN)


def is_boxed(line: str) -> bool:
    """Whether a line is a boxed result on display."""
    opener, newline, box = line.partition("\n")
    return _BOXED.match(opener[:LONGEST_HEADING] + newline + box[:LONGEST_HEADING]) is not None


def may_announce(line: str) -> bool:
    """Whether an unfinished line could still be a heading or a boxed result: then it is held back."""
    bare = line.lstrip(" \t")
    if len(line.rpartition("\n")[2]) > LONGEST_HEADING:
        return False
    if not bare or bare[0] in "#*" or _BOXED_SO_FAR.match(bare):
        return True
    low = bare.lower()
    return any(text.startswith(low) or low.removeprefix(text).strip() in ("", ":", "\uff1a") for text in _PLAIN)


def is_opener(line: str) -> bool:
    """Whether a line opens a display, which a boxed result may follow on the next one."""
    return len(line) < LONGEST_HEADING and line.strip(" \t") in _OPENERS


def may_be_box(line: str, *, ended: bool) -> bool:
    """Whether a line is a boxed result, or the beginning of one in a text that goes on."""
    bare = line.lstrip(" \t")
    return bare.startswith(_BOX) or (not ended and _BOX.startswith(bare))


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Where each line begins, the line with its newline, and whether it is code. No other character parts two lines.

    What opens a display is one line with a box on the next one.
    """
    opener = ""
    for start, text_of_line, before, after in fenced_lines(text):
        ended = start + len(text_of_line) < len(text)
        line = f"{text_of_line}\n" if ended else text_of_line
        in_code = bool(before or after)
        if opener and not may_be_box(text_of_line, ended=ended):
            yield start - len(opener), opener, False
            opener = ""
        if not in_code and not opener and ended and is_opener(text_of_line):
            opener = line
            continue
        yield start - len(opener), opener + line, in_code
        opener = ""


def is_chinese(text: str) -> bool:
    """Whether a text is written in Chinese, formulas and names of other scripts in it notwithstanding."""
    n_chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    return 3 * n_chinese > sum(character.isalpha() for character in text)


def causal_start(text: str) -> int | None:
    """Where the answer would have begun for someone who read the text as it came; None where it would not."""
    for place, line, in_code in _lines(text):
        if not in_code and (is_boxed(line) or (line.endswith("\n") and is_heading(line.rstrip("\r\n")))):
            return place
    return None


def final_start(text: str, *, ended: bool = True) -> int | None:
    """Where the answer begins in a whole text; None where nothing says so, and then all of it is the answer.

    ended: the model ended its turn; a text that was cut has no closing sentence.
    """
    heading, boxed = None, None
    unclosed = unclosed_start(text)  # a fence that nothing closes opens nothing
    for place, line, in_code in _lines(text):
        if (not in_code or place >= unclosed) and _announces(line):
            heading = place
        elif "\\boxed{" in line:
            boxed = place
    if heading is not None and _has_text_after_heading(text[heading:]):
        return heading
    if not ended:
        return None
    closing = _closing_start(text, boxed)
    return closing if closing is not None else boxed


def _announces(line: str) -> bool:
    """Whether a line is a heading, or begins with one that is closed and goes on with the answer."""
    bare = line.rstrip("\r\n")
    if is_heading(bare):
        return True
    found = _HEADING.match(bare)
    return found is not None and found["end"].startswith("**") and not {":", "\uff1a"}.isdisjoint(found[0])


def _has_text_after_heading(text: str) -> bool:
    line, _, rest = text.partition("\n")
    return bool(rest.strip()) or not is_heading(line.rstrip("\r"))


def _closing_start(text: str, boxed: int | None) -> int | None:
    """The last sentence that announces the answer; before a boxed result only one that leads to it."""
    starts = [0, *(match.end() for match in _SENTENCE.finditer(text))]
    if boxed is not None:
        before = [start for start in starts if start <= boxed and text[start:boxed].count("\n") <= 2]
    else:
        before = [start for start in starts if start >= min(len(text) * _TAIL, len(text) - _NEAR)]
    found = [start for start in before if _CLOSING.match(text, start) or _concludes(text, start)]
    if not found or _is_doubted(text, found[-1]):
        return None
    return found[-1]


def _concludes(text: str, start: int) -> bool:
    """Whether the text's last paragraph is one sentence that draws a conclusion."""
    return text[max(0, start - 2) : start] == "\n\n" and _CONCLUSION.fullmatch(text, start) is not None


def _is_doubted(text: str, start: int) -> bool:
    end = _SENTENCE.search(text, start)
    return end is not None and _DOUBT.match(text, end.end()) is not None
