"""Which scripts an answer may have letters of: what "auto" decides, of whose words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.prompt.question import flatten_texts, read_question
from qwq_lite.prompt.script_intent import AnswerScript, scripts_to_mask
from qwq_lite.text import unicode_scripts

MASKED_PROMPTS = [
    "How many positive integers n ≤ 100 satisfy n² ≡ 1 (mod 8)? Use φ(n) and ∑.",
    "Explain naïve Bayes to a café owner, s'il vous plaît. 😀",
    "Write a Python script that sorts a list; use the programming language's own sort. Use lowercase English letters.",
    "Output English ONLY. Give a score for each item.",
    "You are a helpful assistant. Always answer in English, please.",
    "Please reply only in French.",
    "What is the Chinese remainder theorem? State it with Greek letters.",
    "Answer in English, not in French, and use English or German only.",
    "Write a title for my blog post. It should be titled with a pun.",
    "Schreibe einen Titel für meinen Blog.",
    "<html><head><meta charset='utf-8'><title>Home</title></head><script src='x.js'></script></html>",
    "with open(path, encoding='UTF-8') as file: text = file.read().encode('utf-8')",
    "How do I spell 'necessary'?",
    "Use idiomatic Python idioms.",
    "Localize the bug, and improve the fault localization.",
    "Am I entitled to a refund?",
    "What is the regular expression for a date? Where is it called in main?",
    "Keep the order of the original list; in the original list it is sorted. Ask for the full name.",
    "Is arable land scarce?",
    "Πόσο κάνει δύο και τρία;",
    "Wie viele Rosen hat Patricia?",
]
FREE_PROMPTS = [
    "How do you say good morning in Japanese?",
    "Tell me about the Russian novel.",
    "What is the capital of 日本?",
    "Сколько будет два плюс три?",
    "नमस्ते, how are you?",
    "Translate this sentence.",
    "Give me a translation of 'hello'.",
    "What is the original title of Spirited Away?",
    "Quote the title of that film as it was released.",
    "Which Unicode code points are they?",
    "Write my name in kanji.",
    "In which script is it written?",
    "What is the difference between hiragana and katakana?",
    "Which languages are spoken in Peru?",
    "Transliterate 'namaste'.",
    "What's the word for water there?",
    "Encode this as UTF-8.",
    "The lyrics of that K-pop song, please.",
    "What is the etymology of 'tsunami'?",
    "Answer in English: what is the Korean word for love?",
    "Übersetze 'Guten Morgen' ins Chinesische.",
    "Comment dit-on bonjour en japonais ?",
    "¿Cómo se escribe mi nombre en árabe?",
    "Wie heißt der Titel im Original?",
    "Quote the opening line in the original.",
    "Give her name in its own characters.",
    "Write a kaomoji that shrugs.",
    "What is the local title of the film?",
    "Who sang on the album titled 'Sakura'?",
    "Write the title of the first novel, please.",
    "Localize these strings for the app.",
    "What is this dish called in Osaka?",
    "Encode this text as UTF-8 and show the bytes.",
    "Donne-moi le titre original.",
    "Πώς λέγεται το νερό στα κινέζικα;",
]


@pytest.mark.parametrize("text", MASKED_PROMPTS)
def test_auto_masks_all_where_nothing_calls_for_other_letters(text: str) -> None:
    assert scripts_to_mask("auto", [text]) == unicode_scripts.MASKABLE == scripts_to_mask(None, ["", text])


@pytest.mark.parametrize("text", FREE_PROMPTS)
def test_auto_masks_nothing_where_anything_does(text: str) -> None:
    assert scripts_to_mask("auto", [text]) == frozenset()
    assert scripts_to_mask("auto", ["How many?", text.upper(), "So."]) == frozenset()


OTHERS = [  # languages that are written otherwise
    "Chinese", "Mandarin", "Cantonese", "Taiwanese", "Japanese", "Korean", "Russian", "Ukrainian", "Belarusian", "Bulgarian",
    "Serbian", "Macedonian", "Mongolian", "Kazakh", "Kyrgyz", "Tajik", "Uzbek", "Arabic", "Persian", "Farsi", "Pashto", "Urdu",
    "Kurdish", "Hebrew", "Yiddish", "Thai", "Lao", "Hindi", "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Marathi",
    "Gujarati", "Punjabi", "Nepali", "Sinhala", "Burmese", "Khmer", "Tibetan", "Sanskrit", "Armenian", "Georgian", "Amharic",
]  # fmt: skip
ORDERS = [
    "Reply in {} and English.", "Write hello in {} and English.", "Use {}, not English.", "Answer in {}, not in English.",
    "Only {}, no English please.", "Speak {} and English with me.", "Give an example first in {}, then in English.",
    "Respond in English and {}.", "Not English: always {}.", "Write it in English, then in {}.", "Output {} text, English text.",
    "Use English or {}.", "Answer in both English, French and {}.", "Write English with a {} word in it, in English only.",
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_names_an_other_language_masks_nothing(order: str) -> None:
    """Whatever language of Latin letters it names too."""
    for language in OTHERS:
        for latin in ("English", "French", "Vietnamese"):
            text = order.replace("English", latin).format(language)
            assert scripts_to_mask("auto", [text]) == frozenset(), text


@given(
    st.lists(st.sampled_from(["in", "use", "only", "not", "English", "French,", "and", "reply"]), max_size=12),
    st.data(),
)
def test_no_words_around_it_hide_a_language(words: list[str], data: st.DataObject) -> None:
    words.insert(data.draw(st.integers(0, len(words))), data.draw(st.sampled_from(OTHERS)))
    assert scripts_to_mask("auto", [" ".join(words)]) == frozenset()


@given(st.text(), st.sampled_from(FREE_PROMPTS), st.text())
def test_auto_is_free_whatever_stands_around_a_word(before: str, text: str, after: str) -> None:
    assert scripts_to_mask("auto", [f"{before}\n{text}\n{after}"]) == frozenset()


def test_the_users_word_counts_whatever_was_asked() -> None:
    texts = FREE_PROMPTS
    every = unicode_scripts.MASKABLE
    assert scripts_to_mask("any", ["How many?"]) == frozenset() == scripts_to_mask("auto", None)
    assert scripts_to_mask("latin", texts) == every
    assert scripts_to_mask("han", texts) == every - {"han"}
    assert scripts_to_mask("kana", texts) == every - {"han", "kana"}
    named: list[AnswerScript] = ["hangul", "cyrillic", "arabic", "hebrew", "thai"]
    for script in named:
        assert scripts_to_mask(script, None) == every - {script}


def test_what_was_written_in_a_prompt() -> None:
    parts = [{"type": "text", "text": "file"}, {"type": "text", "text": "more"}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "tool", "content": "4"},
    ]
    assert read_question(messages).list_texts(tag=None) == ["Be brief.", "text", "file", "text", "more", "4"]
    assert read_question("So").list_texts(tag=None) == ["So"]
    assert read_question([1, 2, 3]).list_texts(tag="</think>") is None
    assert [*flatten_texts([{"name": "f", "parameters": {"x": "number", "n": 3}}])] == ["f", "number"]


REPLIES = [  # what a model wrote earlier; the letters that count of one without tags, and of one with tags
    ("The Chinese word for it is a translation.", "", ""),
    ("所以\n\n**Final Answer**\n\n4", "", "所以"),
    ("Hmm 所以.\n\n**Final Answer**\n\n四 and 4", "四", "所以四"),
    ("<think>所以</think>4", "", ""),
    ("<think>所以</think>四", "", "四"),
    ("So.\n\n**Final Answer**\n\n```py\nx = '四'\n```\nin Hindi, नहीं.", "", ""),
    ("所以四。", "", "所以四"),
]


@pytest.mark.parametrize(("reply", "undivided", "tagged"), REPLIES)
def test_earlier_words_of_the_model_call_for_nothing(reply: str, undivided: str, tagged: str) -> None:
    for content in (reply, [{"type": "text", "text": reply}]):
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": content},
        ]
        for tag, letters in ((None, undivided), ("</think>", tagged)):
            texts = read_question([*messages, {"role": "user", "content": "And now?"}]).list_texts(tag=tag)
            assert texts is not None and "".join(texts[1:-1]) == letters
            assert scripts_to_mask("auto", texts) == (frozenset() if letters else unicode_scripts.MASKABLE)
