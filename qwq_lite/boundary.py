"""Where the answer begins in the text of a model that has no thinking tags, such as QwQ-32B-Preview. Pure, over text.

Of 44 real outputs of that model about half mark the answer with a heading, "**Final Answer**" before all, some with a closing
sentence, some not at all. A heading on a line of its own and a boxed result are seldom wrong while the text is still coming;
closing sentences are: "So the answer is" was followed by more thought in 12 of 44. So they count only in a text that has ended.
"""

from __future__ import annotations

import re

_NOUNS = (
    r"answers?|solutions?|outputs?|results?|responses?|scores?|ratings?|rankings?|code|verdict|conclusions?|decision|choices?"
    r"|evaluations?|list|version|implementation|explanation|summary|statement|guess|clue"
)
_CHINESE = "答案|解答|回答|结果|评分|得分|分数|方案|结论|输出|代码|排名|选择|答复|解法|总结"
# A heading is Markdown's, or one bold line; a colon may stand within or after the stars.
HEADING = re.compile(
    rf"[ \t]*(?:\#{{1,6}}[ \t]*(?:\*\*)?|\*\*)[ \t]*"
    rf"(?:(?:(?:my|the|our|a)[ ]+)?final[ ]+(?:[a-z]+[ ]+)?(?:{_NOUNS})|最[终終后後]的?(?:{_CHINESE}))"
    r"[ \t]*[::]?[ \t]*(?:\*\*)?[ \t]*[::]?[ \t]*",
    re.IGNORECASE,
)
LONGEST_HEADING = 60  # characters; a line that is longer is none
_BOXED = re.compile(r"[ \t]*(?:\\\[|\$\$?|\\\()?[ \t]*\\boxed\{")
_CLOSING = re.compile(
    r"(?:(?:so|thus|hence|therefore|in conclusion|in summary|overall|finally|and so|ultimately)\b[, ]*)?"
    r"(?:i(?:'ll| will| would)? (?:conclude|say|answer)\b[^.\n]{0,40}?)?"
    r"(?:the|my|our)[ ](?:final |correct |best |required |only )*(?:answers?|solution|result|final scores?|ratings?)\b"
    r"(?:[ ](?:here|to (?:this|the) (?:question|problem)))?[ ]?(?:is|are|would be|should be|must be|as follows|:)"
    r"|(?:因此|所以|综上所述|综上|故|总之)[，, ]*[^。\n]{0,12}?(?:答案|评分|得分|结果|结论|选项)[^。\n]{0,6}?(?:如下|为|是|：)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?。！？](?:[ \t]+|(?<=[。！？]))|\n+")
_TAIL, _NEAR = 0.6, 200  # a closing sentence stands in the last part of a text, or so many characters from its end


def is_heading(line: str) -> bool:
    """Whether a whole line announces the answer."""
    return len(line) <= LONGEST_HEADING and HEADING.fullmatch(line) is not None


def may_become_heading(line: str) -> bool:
    """Whether an unfinished line could still be one: then it is held back."""
    bare = line.lstrip(" \t")
    return len(line) <= LONGEST_HEADING and (not bare or bare[0] in "#*")


def is_boxed(line: str) -> bool:
    """Whether a line is a boxed result on display."""
    return _BOXED.match(line) is not None


def causal_start(text: str) -> int | None:
    """Where the answer would have begun for someone who read the text as it came; None where it would not."""
    place = 0
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and (is_heading(line.rstrip("\r\n")) or is_boxed(line)):
            return place
        place += len(line)
    return place - len(line) if text and is_boxed(line) else None


def final_start(text: str, *, ended: bool = True) -> int | None:
    """Where the answer begins in a whole text; None where nothing says so, and then all of it is the answer.

    ended: the model ended its turn; a text that was cut has no closing sentence.
    """
    heading, boxed, place = None, None, 0
    for line in text.splitlines(keepends=True):
        if is_heading(line.rstrip("\r\n")):
            heading = place
        elif "\\boxed{" in line:
            boxed = place
        place += len(line)
    if heading is not None and text[heading:].count("\n") and text[heading:].partition("\n")[2].strip():
        return heading
    if not ended:
        return None
    closing = _closing_start(text, boxed)
    return closing if closing is not None else boxed


def _closing_start(text: str, boxed: int | None) -> int | None:
    """The last sentence that announces the answer; before a boxed result only one that leads to it."""
    starts = [0, *(match.end() for match in _SENTENCE.finditer(text))]
    if boxed is not None:
        before = [start for start in starts if start <= boxed and text[start:boxed].count("\n") <= 2]
    else:
        before = [start for start in starts if start >= min(len(text) * _TAIL, len(text) - _NEAR)]
    found = [start for start in before if _CLOSING.match(text, start)]
    return found[-1] if found else None
