"""Where the answer begins in texts as QwQ-32B-Preview writes them, without tags. `|` marks the place, at the line's start."""

from __future__ import annotations

import pytest

from qwq_lite.text import final_answer

MARKED = {
    "bold heading": "Let me think. 2+3 is 5.\n\n|**Final Answer**\n\n\\[ \\boxed{5} \\]\n",
    "heading and box on the same page": "Hmm, 7 times 8.\n\n|## Final Answer\n\\[ \\boxed{56} \\]",
    "code": "First a draft:\n```python\nx = 1\n```\nThat works.\n\n|## Final Solution\nUse this.\n\n"
    "### Approach\nGo.\n\n### Code\n```python\nx = 2\n```\n",
    "scores": "Number 1 is fitting.\n\n|**Final Scores:**\n\n<number>1</number><score>9</score>\n",
    "Chinese": "让我想想。所以是方块5。\n\n|**最终答案**\n\n$$ \\boxed{\\text{方块5}} $$",
    "Chinese, level two": "好的。\n\n|## 最终答案\n```xml\n<score>7</score>\n```\n",
    "traditional": "想一想。\n\n|**最終答案**\n\n42\n",
    "colon outside": "Well.\n\n|**Final Output**:\n\nGreen\n",
    "indented": "Well.\n\n|  **My Final Answer**\n\nGreen\n",
    "the last of two": "**Final Answer**\n\n5? No, wait, that is wrong.\n\n|**Final Answer**\n\n6\n",
}
ENDED = {
    "closing sentence": "Anthony is Ralph's parent.\n\nYes, that makes sense.\n\n|So, the answer is <ANSWER>1</ANSWER>.",
    "sentence before a box": "It is negligible.\n\n|So, my final answer is:\n\n\\[ \\boxed{1 - p} \\]\n\nWhich is about 1.",
    "box alone": "It is small.\n\n|\\[ \\boxed{1} \\]\n",
    "Chinese lead": "相当不错。\n\n可能不符合主题。\n\n|因此，最终评分如下：\n\n<number>1</number><score>0</score>\n",
}
NONE = {
    "direct": "A small red fruit that grows on trees.",
    "headings of the thought": "**Correct Solution**\n\nWait.\n\n**Alternative Idea**\n\nHmm.\n\n**Another Approach**\n\nNo.",
    "spoken of": "I should write **Final Answer** at the end, as the task asks. Let me see first.",
    "summary": "def f(x):\n    return x\n\nIn summary, this code reads a word and works.",
    "a long line that begins so": "**Final Answer** will be given once I have checked each of the cases above with care.\nHmm.",
    "nothing": "",
}


def split(marked: str) -> tuple[str, int]:
    return marked.replace("|", "", 1), marked.index("|")


@pytest.mark.parametrize("name", MARKED)
def test_a_heading_begins_the_answer(name: str) -> None:
    text, place = split(MARKED[name])
    assert final_answer.final_start(text) == place
    assert final_answer.final_start(text, ended=False) == place
    if name != "the last of two":
        assert final_answer.causal_start(text) == place


@pytest.mark.parametrize("name", ENDED)
def test_a_closing_sentence_counts_once_the_text_has_ended(name: str) -> None:
    text, place = split(ENDED[name])
    assert final_answer.final_start(text) == place
    assert final_answer.final_start(text, ended=False) is None
    assert final_answer.causal_start(text) in (None, text.find("\\["))


@pytest.mark.parametrize("name", NONE)
def test_without_a_boundary_all_is_the_answer(name: str) -> None:
    assert final_answer.final_start(NONE[name]) is None
    assert final_answer.causal_start(NONE[name]) is None


@pytest.mark.parametrize("name", [*MARKED, *ENDED, *NONE])
def test_a_heading_is_one_from_its_first_character_on(name: str) -> None:
    """What is held back while a line may become a heading is enough."""
    text = {**MARKED, **ENDED, **NONE}[name].replace("|", "", 1)
    for line in text.split("\n"):
        if final_answer.is_heading(line):
            assert all(final_answer.may_announce(line[:n]) for n in range(len(line) + 1))
