"""The scripts of an answer: the table, the rows, and answers of a model that prefers Chinese."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import PieceTokenizer, Thoughts
from qwq_lite.events import Answer
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.commands import Steer
from qwq_lite.reply.policies.script import Script, ScriptState
from qwq_lite.reply.policy import Begin, Draw, Policy, Rewind, Taken
from qwq_lite.reply.script_masks import MaskSets, ScriptMasks
from qwq_lite.sampling import Sampling
from qwq_lite.text import unicode_scripts
from qwq_lite.text.lines import Line, follow
from tests.oracle import assigned_characters, merge_by_rank, qwen_ranks

LETTER = unicode_scripts.characters(unicode_scripts.MASKABLE)
NAMES = {
    "han": r"BOPOMOFO (FINAL )?LETTER|CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH|(VERTICAL )?IDEOGRAPHIC ITERATION MARK",
    "kana": r"(HALFWIDTH )?(HIRAGANA|KATAKANA|HENTAIGANA) (DIGRAPH|(SMALL )?LETTER|ITERATION|VOICED ITERATION)",
    "hangul": r"(HALFWIDTH )?HANGUL ",
    "cyrillic": r"(COMBINING |MODIFIER LETTER )?CYRILLIC (SMALL |CAPITAL )?LETTER|MODIFIER LETTER CYRILLIC ",
    "arabic": r"ARABIC (MATHEMATICAL|LETTER|LIGATURE|SMALL)",
    "hebrew": r"HEBREW (LETTER|LIGATURE|YOD)",
    "thai": r"THAI CHARACTER ",
}


@pytest.mark.parametrize("script", sorted(unicode_scripts.MASKABLE))
def test_the_table_is_unicodes(script: str) -> None:
    found = unicode_scripts.characters(frozenset({script}))
    name = re.compile(NAMES[script])
    kind = {
        "han": "BOPOMOFO|CJK|KANGXI|HANGZHOU|IDEOGRAPH|OLD CHINESE|CHINESE|VIETNAMESE",
        "kana": "KANA|GANA|SQUARE",
        "hangul": "HANGUL|KOREAN",
    }
    any_name = re.compile(kind.get(script, f"{script.upper()}|RUMI|RIAL|AFGHANI|SLAVONIC"))
    for character in assigned_characters():
        named = unicodedata.name(character, "")
        if unicodedata.category(character)[0] == "L" and name.match(named):
            assert found.match(character), named
        if found.match(character):
            assert any_name.search(named), named


def test_what_all_scripts_share_is_in_no_script() -> None:
    for character in assigned_characters():
        named = unicodedata.name(character, "")
        if re.match(
            r"LATIN|GREEK|MATHEMATICAL|DIGIT|FULLWIDTH (LATIN|DIGIT)|COMBINING [A-BD-Z]|VARIATION|DOUBLE-STRUCK", named
        ):
            assert not LETTER.match(character), named
        if "LATIN" in named.split() or "GREEK" in named.split():
            assert not unicode_scripts.has_other_letters(character), named
        if LETTER.match(character) and character.isalpha():
            assert unicode_scripts.has_other_letters(character), named
    assert not unicode_scripts.has_other_letters("½ ① ² ℝ ℵ₀ ∑ µ ﬁ ª 𝔸 ˈ 😀 e\u0301 Ω ά")
    assert (
        unicode_scripts.has_other_letters("देव")
        and unicode_scripts.has_other_letters("ა")
        and unicode_scripts.has_other_letters("ー")
    )


@cache
def pieces() -> list[bytes]:
    return [*sorted(qwen_ranks(), key=qwen_ranks().__getitem__), *([b""] * 421)]


@cache
def qwen_masks(*free: str) -> ScriptMasks:
    return ScriptMasks(pieces(), unicode_scripts.MASKABLE - set(free))


def tokens_of(text: str) -> list[int]:
    """A text in Qwen's pieces; no piece goes over a word's beginning."""
    ranks = qwen_ranks()
    words = re.findall(r" ?\S+|\s", text)
    return [ranks[part] for word in words for part in merge_by_rank(word.encode(), ranks, 1 << 30)]


def refused(masks: ScriptMasks, tokens: list[int]) -> list[int]:
    found, pending = [], b""
    for token in tokens:
        if masks.row(pending)[token]:
            found.append(token)
        whole = pending + pieces()[token]
        pending = whole[codecs.utf_8_decode(whole, "replace", False)[1] :]
    return found


FREE_RANGES = [
    (0x20, 0x36F), (0x370, 0x3FF), (0x1D00, 0x1FFF), (0x2000, 0x2BFF), (0x2C60, 0x2C7F), (0x3000, 0x3004), (0x3008, 0x3020),
    (0xA720, 0xA7FF), (0xFB00, 0xFB06), (0xFE00, 0xFE0F), (0xFF01, 0xFF5E), (0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF),
]  # fmt: skip


def test_emoji_mathematics_accents_and_signs_are_never_masked() -> None:
    masks = qwen_masks()
    for first, last in FREE_RANGES:
        for character in map(chr, range(first, last + 1)):
            if unicodedata.category(character) in ("Cn", "Cs") or LETTER.match(character):
                continue
            for text in (character, f" {character}", f"a{character}", f"{character}{character}"):
                assert not refused(masks, tokens_of(text)), (hex(ord(character)), text)
    text = "👩🏽‍🚀 🏳️‍🌈 ❤️ 1️⃣ 🇩🇪 ∀ε>0 ∫₀^∞ √π ≤ ≠ ⇒ ℝ 𝔸 “…” — ‘’ « » € £ naïve Ångström e\u0301 Việt Nam ½ ① ™ ©"
    assert not refused(masks, tokens_of(text))


def decoded(pending: bytes, piece: bytes) -> tuple[str, bytes]:
    text, n_read = codecs.utf_8_decode(pending + piece, "strict", False)
    return text, (pending + piece)[n_read:]


def completions(beginning: bytes) -> tuple[int, int]:
    """Free and assigned characters that begin so, by asking each character."""
    found = by_beginning().get(beginning, "")
    return len(found) - len(LETTER.findall(found)), len(found)


@cache
def by_beginning() -> dict[bytes, str]:
    found: dict[bytes, list[str]] = {}
    for character in assigned_characters():
        whole = character.encode()
        for n in range(1, len(whole)):
            found.setdefault(whole[:n], []).append(character)
    return {beginning: "".join(some) for beginning, some in found.items()}


def is_free(pending: bytes, piece: bytes) -> bool:
    """The rule as it is said."""
    try:
        text, rest = decoded(pending, piece)
    except UnicodeDecodeError:
        return False
    if LETTER.search(text):
        return False
    n_free, n_assigned = completions(rest)
    return not rest or (n_free > 0 if pending and not text else 2 * n_free > n_assigned)


def test_rows_do_what_they_are_for_of_every_piece() -> None:
    """For nothing pending, and for every beginning that may then be."""
    masks = qwen_masks()
    first = masks.row()
    assert [value == 0 for value in first.tolist()] == [is_free(b"", piece) for piece in pieces()]
    pendings = {decoded(b"", pieces()[token])[1] for token in np.flatnonzero(first == 0)} - {b""}
    continuing = [token for token, piece in enumerate(pieces()) if piece and piece[0] & 0xC0 == 0x80]
    assert len(pendings) > 250
    for pending in pendings:
        row = masks.row(pending)
        assert row.shape == (152_064,) and row.dtype == np.float32 and not row.flags.writeable
        free = [token for token in continuing if is_free(pending, pieces()[token])]
        assert np.flatnonzero(row == 0).tolist() == free and free


def test_a_character_that_nothing_can_finish_is_left_where_it_is() -> None:
    masks = qwen_masks()
    assert (masks.row("中".encode()[:2]) == masks.row()).all()
    assert (masks.row("Ж".encode()[:1]) == masks.row()).all()
    few = ScriptMasks([b"a", b"\xe2", "中".encode(), b""], frozenset({"han"}))
    assert few.row().tolist() == [0, 0, -np.inf, 0] == few.row(b"\xe2").tolist()


def test_rows_are_few_and_those_used_last_are_kept() -> None:
    masks = ScriptMasks([*pieces()[:300], b"\xe2\x88"], unicode_scripts.MASKABLE)
    first, often, once = masks.row(), masks.row(b"\xe2\x88"), masks.row(b"\xe2\x89")
    for n in range(100):
        masks.row(bytes([0xE1, 0x80 + n % 64, *([0x80] * (n // 64))]))
        assert masks.row(b"\xe2\x88") is often
    assert masks.row() is first and masks.n_bytes <= 64 * 4 * 301
    assert masks.row(b"\xe2\x89") is not once and (masks.row(b"\xe2\x89") == once).all()


def test_rows_are_the_same_from_whatever_thread() -> None:
    masks, alone = (ScriptMasks([bytes([n]) for n in range(256)], unicode_scripts.MASKABLE) for _ in range(2))
    beginnings = [bytes([0xE2, second]) for second in range(0x80, 0xC0)] + [bytes([0xCD + n]) for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        rows = [*pool.map(masks.row, beginnings * 8)]
    for pending, row in zip(beginnings * 8, rows, strict=True):
        assert (row == alone.row(pending)).all()


def test_a_vocabulary_has_a_few_sets_that_share_its_pieces() -> None:
    asked: list[int] = []

    def piece(token: int) -> bytes:
        asked.append(token)
        return bytes([token])

    sets = MaskSets(piece, 128)
    assert sets.of(frozenset()) is None and not asked
    with ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: sets.of(unicode_scripts.MASKABLE), range(8))}
    assert len(found) == 1 and asked == [*range(128)]
    for script in sorted(unicode_scripts.MASKABLE):
        masks = sets.of(frozenset({script}))
        assert masks is not None and masks.masked == {script}
        assert sets.of(frozenset({script})) is masks
        assert sets.of(unicode_scripts.MASKABLE) in found, "it was used last but one"
    assert sets.of(frozenset({"arabic"})) is not None
    assert asked == [*range(128)]


def test_a_script_that_was_asked_for_is_free() -> None:
    text = {
        "han": "最终答案",
        "kana": "ひらがなカタカナ",
        "hangul": "한국어",
        "cyrillic": "Ответ",
        "arabic": "جواب",
        "thai": "คำ",
    }
    for script, word in text.items():
        assert not refused(qwen_masks(script), tokens_of(word)), script
        assert refused(qwen_masks(), tokens_of(word))


IN_CODE = [
    ("```", False, False), ("```xml", False, False), ("```\n", True, True), ("Text ```\n", False, False),
    ("  ```py\nx", True, True), ("```\nx\n```", True, False), ("```\nx\n```\n", False, False), ("```\nx\n```x\n", True, True),
    ("```x```\n", False, False), ("```\n`` x", True, True), ("``\n", False, False),
    ("a\n```\n\n", True, True), ("````\n", True, True), ("````\n```\n", True, True), ("````\n`````\n", False, False),
    ("~~~\n", True, True), ("~~~\n```\n", True, True), ("~~~\n```\n~~~~\n", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "in_code", "is_free"), IN_CODE)
def test_code_is_free_however_it_is_split(text: str, in_code: bool, is_free: bool) -> None:
    policy = Script(ScriptMasks([b"a", "中".encode()], unicode_scripts.MASKABLE))
    for width in (1, 2, 3, 100):
        place, line = policy.start(Begin()), Line()
        for n in range(0, len(text), width):
            line, rows = follow(line, text[n : n + width])
            place = policy.observe(place, Taken(0, text[n : n + width], "answer", n, line=line, rows=rows)).state
        assert bool(place.line.fence) == in_code
        assert (policy.constrain(place, Draw(Sampling())).allowed is None) == is_free
    line, rows = follow(Line(), "x")
    taken = Taken(0, "x", "answer", 9, turned=True, line=line, rows=rows)
    assert policy.observe(place, taken).state == ScriptState(True, line)
    assert policy.constrain(ScriptState(), Draw(Sampling())).allowed is None, "the thought is free"
    assert Script(None, policy.answer).constrain(ScriptState(), Draw(Sampling())).allowed is not None


# Answers of a fake engine: sample first, then with the row.

END, OPEN, CLOSE = 151_645, 151_643 + 20, 151_643 + 21
TAGS, UNDIVIDED = Thoughts("tags", OPEN, CLOSE), Thoughts("undivided")


def without_code(text: str) -> str:
    """A text without its fenced blocks, by reading its lines."""
    found, in_code = [], False
    for line in text.split("\n"):
        bare = line.strip(" \t\r")
        fence = re.fullmatch(r"`{3,}", bare) if in_code else re.fullmatch(r"`{3,}[^`]*", bare)
        if fence or not in_code:
            found.append(line)
        in_code ^= fence is not None
    return "\n".join(found)


@cache
def adversarial() -> npt.NDArray[np.float32]:
    """Logits of a model that wants Chinese before all, whole or in bytes, then any other script, then what there is."""
    row = np.zeros(len(pieces()), np.float32)
    for token, piece in enumerate(pieces()):
        if not piece.isascii():
            row[token] = 18 if LETTER.search(piece.decode("utf-8", "ignore")) else 14
            try:
                piece.decode()
            except UnicodeDecodeError:
                row[token] = 19
    return row


def answers(
    rules: reply_rules.Rules, wish: Iterator[int | None], source: np.random.Generator, n_answer: int
) -> tuple[str, int, ReplyBuilder]:
    """What the reader sees of one answer, and how many tokens were refused. wish: tokens that the model wants before all."""
    track = ReplyBuilder(rules.policies, rules.begin, pieces().__getitem__, tokens_of)
    text, n_refused, n_left = "", 0, n_answer
    while n_left:
        draw = track.constrain(Sampling())
        token = draw.forced
        if token is None:
            row = adversarial().copy()
            spots = source.integers(len(row), size=4000)
            row[spots] += source.random(4000, np.float32) * 12
            wanted = next(wish)
            if wanted is not None:
                row[wanted] += 100
            row[list(draw.banned)] = -np.inf
            token = int(row.argmax())
            if draw.allowed is not None and draw.allowed[token] < 0:
                n_refused += 1
                token = int((row + draw.allowed).argmax())
        events, action = track.take(token)
        text += "".join(event.text for event in events if isinstance(event, Answer))
        n_left -= track.state.phase == "answer"
        assert action is None or isinstance(action, Rewind)
    return text + "".join(event.text for event in track.flush() if isinstance(event, Answer)), n_refused, track


def rules_of(model: Thoughts, question: str = "How many?") -> reply_rules.Rules:
    return reply_rules.make_rules(
        Options(answer_script="auto"), model,
        read_question([{"role": "user", "content": question}] if model is TAGS else question),
        [OPEN] if model is TAGS else [1], 32_768, PieceTokenizer(frozenset({END}), pieces().__getitem__, tokens_of),
        (qwen_masks(), None),
    )  # fmt: skip


def thinking(piece: Callable[[int], bytes] | None = None) -> ReplyBuilder:
    """A reply without tags that has not begun."""
    begin = Begin("thinking", undivided=True)
    return ReplyBuilder(rules_of(UNDIVIDED).policies, begin, piece or pieces().__getitem__, tokens_of)


HEADINGS = [
    "**最终答案**\n",
    "**最终答案**\n\n",
    "## 最终答案\n",
    "**最终评分：**\n\n",
    "### 答案\r\n",
    "**最後的答案**：\n",
]
GOES_ON = [
    "**最终答案：** 4 中文",
    "**最终答案**：4",
    "## **答案：** 所以",
    "  **最终评分:**\t中",
]  # closed, with a colon


def test_no_letter_of_a_masked_script_in_a_thousand_answers() -> None:
    source = np.random.default_rng(5)
    n_refused = n_code = 0
    for n in range(1000):
        model = (TAGS, UNDIVIDED)[n % 2]
        heading = (HEADINGS + GOES_ON)[n // 2 % len(HEADINGS + GOES_ON)]
        thought = tokens_of("Hmm, 所以答案是三。\n\n") + (tokens_of(heading) if model is UNDIVIDED else [CLOSE])
        code = tokens_of("So:\n```c\nx = '中'\n```\n") if n % 5 == 0 else []
        text, refusals, track = answers(rules_of(model), chain(thought, code, repeat(None)), source, 16 + len(code))
        assert not LETTER.search(without_code(text)), text
        assert refusals > 3
        n_refused += refusals
        n_code += LETTER.search(text) is not None
        assert (track.state.phase, track.thought_end) == ("answer", "itself")
        if model is UNDIVIDED:
            assert text.startswith("**Final Answer**\n\n")
            whole = b"".join(map(pieces().__getitem__, track.tokens)).decode("utf-8", "replace")
            assert "所以答案是三。\n\n**Final Answer**\n\n" in whole
    assert n_refused > 10_000
    assert len(qwen_masks()._rows) > 20, "bytes were drawn too"
    assert n_code > 150, "code is left alone"


@pytest.mark.parametrize("heading", ["**Final Answer**\n\n", "**Final Scores:**\n\n"])
def test_a_heading_in_the_users_letters_stands(heading: str) -> None:
    wish = chain(tokens_of("所以。\n\n" + heading), repeat(None))
    text, _, track = answers(rules_of(UNDIVIDED), wish, np.random.default_rng(1), 10)
    assert text.startswith(heading) and track.attempt == 0


def test_a_foreign_heading_at_once_and_one_in_code() -> None:
    text, _, track = answers(
        rules_of(UNDIVIDED), chain(tokens_of("**最终答案**\n\n"), repeat(None)), np.random.default_rng(1), 10
    )
    assert text.startswith("**Final Answer**\n\n") and track.attempt == 1
    track = thinking()
    for token in tokens_of("```\n**最终答案**\n\n中"):
        assert track.take(token)[1] is None
    assert track.state.phase == "thinking"


@pytest.mark.parametrize("heading", GOES_ON)
def test_a_foreign_heading_that_goes_on_with_the_answer_is_forced_anew(heading: str) -> None:
    wish = chain(tokens_of(f"So 所以。\n\n{heading}"), repeat(None))
    text, _, track = answers(rules_of(UNDIVIDED), wish, np.random.default_rng(1), 10)
    assert text.startswith("**Final Answer**\n\n") and not LETTER.search(text)
    assert (track.attempt, track.thought_end) == (1, "itself")
    assert track.texts("stop")[0].rstrip() == "So 所以。"


ANNOUNCES = ["**Final Answer:** ", "**Answer**: ", "### **My final answer:** "]
DOES_NOT = [
    "**Final Answer ", "Final answer: ", "So the answer is ", "**最终答案 ", "> **答案：** ", "```\n**答案：** ", "**Idea:** ",
]  # fmt: skip


@pytest.mark.parametrize("heading", ANNOUNCES + DOES_NOT)
def test_what_is_masked_after_words_on_the_answers_own_line(heading: str) -> None:
    """A heading that is closed and bears a colon; after all else the thought goes on, and is free."""
    track = thinking()
    for token in tokens_of(f"So 所以。\n\n{heading}"):
        assert track.take(token)[1] is None
    assert track.state.phase == "thinking"
    assert (track.constrain(Sampling()).allowed is None) == (heading in DOES_NOT)
    if heading in ANNOUNCES:
        for token in tokens_of("4.\n\nThat is it."):
            assert track.take(token)[1] is None
            assert track.constrain(Sampling()).allowed is not None
        assert track.texts("stop")[1] == f"{heading}4.\n\nThat is it."


@given(st.sampled_from(HEADINGS + GOES_ON + ANNOUNCES), st.integers(1, 9))
def test_a_heading_is_one_however_it_is_split(heading: str, width: int) -> None:
    text = f"So.\n\n{heading}x"
    track = ReplyBuilder(
        rules_of(UNDIVIDED).policies,
        Begin("thinking", undivided=True),
        lambda n: text[n : n + width].encode(),
        tokens_of,
    )
    actions = [track.take(n)[1] for n in range(0, len(text), width) if not track.attempt]
    assert any(actions) == bool(LETTER.search(heading))
    assert actions[-1] is not None or track.constrain(Sampling()).allowed is not None


def test_a_foreign_heading_that_the_reader_gave_as_a_hint_stands() -> None:
    """Nobody drew it, so nobody is corrected; what follows is masked all the same."""
    for heading in ("**最终答案**\n\n", "**最终答案：** 4\n\n"):
        track = thinking()
        for token in tokens_of("So, two.\n"):
            track.take(token)
        hint = track.steer(Steer(heading, None))
        assert hint is not None
        track.rewind(hint)
        while (forced := track.constrain(Sampling()).forced) is not None:
            assert track.take(forced)[1] is None
        assert track.attempt == 1 and track.constrain(Sampling()).allowed is not None


def test_words_that_end_a_thought_are_in_letters_that_the_answer_may_have() -> None:
    question = "这是什么？"
    assert reply_rules.closing_words(UNDIVIDED, question) == ("\n\n**最终答案**\n\n",)
    assert reply_rules.closing_words(UNDIVIDED, question, qwen_masks()) == ("\n\n**Final Answer**\n\n",)
    assert reply_rules.closing_words(UNDIVIDED, question, qwen_masks("han")) == ("\n\n**最终答案**\n\n",)


@given(st.lists(st.integers(0, 151_642) | st.integers(0, 255), max_size=60))
@example(list(range(94, 256)))
def test_what_the_rows_let_come_never_makes_a_letter(tokens: list[int]) -> None:
    """Whatever is drawn, bytes alone too: what is refused is not taken, and the text of the rest is clean."""
    masks, pending, text = qwen_masks(), b"", ""
    for token in tokens:
        if masks.row(pending)[token] == 0:
            made, pending = decoded(pending, pieces()[token]) if pieces()[token] else ("", pending)
            text += made
    assert not LETTER.search(text)


def test_the_row_is_that_of_the_bytes_that_are_pending() -> None:
    masks = qwen_masks()
    track = ReplyBuilder((Script(masks),), Begin(), pieces().__getitem__, tokens_of)
    assert track.constrain(Sampling()).allowed is masks.row()
    track.take(qwen_ranks()[b"\xe2\x88"])
    assert track.constrain(Sampling()).allowed is masks.row(b"\xe2\x88")
    assert track.constrain(Sampling()).allowed is not masks.row()


def test_one_that_masks_nothing_changes_no_draw() -> None:
    policy: Policy = Script(None)
    draw = Draw(Sampling(), pending=b"\xe4")
    assert policy.constrain(policy.start(Begin()), draw) is draw
