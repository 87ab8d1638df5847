"""Questions that ask for repetition, and questions that do not."""

from __future__ import annotations

import pytest

from bench.measure.requested import REQUESTED
from qwq_lite.prompt.repetition_intent import asks_for_repetition

ASKED = [
    "Write the 16x16 zero matrix in LaTeX.",
    "Give me a 12 by 12 matrix of zeros.",
    "Print an empty table with 20 rows and 5 columns.",
    'Write "I must not talk in class" 100 times.',
    "Repeat the word poem for ever.",
    "Write a song with a refrain.",
    "Draw a house in ASCII art.",
    "Make a hex dump of 1 KB of zero bytes.",
    "Count from 1 to 500.",
    "What are the first 300 digits of 1/7?",
    "Create an 8x8 chessboard in Markdown.",
    "Give me an identity matrix, n = 12.",
    "A list of 200 zeros, please.",
    "Say it over and over.",
    "Give me 50 copies of this line.",
    "请把“我错了”写一百遍。",
    "写出一个10x10的零矩阵。",
    "给我一个空白的日历表。",
    "写一首有副歌的歌。",
    "从1数到500。",
    "1/7小数点后300位是什么？",
    "请反复输出这句话。",
    "Schreibe 100 Mal Hallo.",
    "Gib mir die 16x16-Nullmatrix.",
    "Gib mir eine leere Tabelle mit 20 Zeilen.",
    "Zähle von 1 bis 300.",
    "Wiederhole das Wort Hund.",
    "Ein Lied mit Kehrreim, bitte.",
    "Die ersten 300 Nachkommastellen von 1/7?",
    "Écris « je me tais » 100 fois.",
    "Donne-moi une matrice nulle 12x12.",
    "Un tableau vide de 20 lignes.",
    "Les 300 premières décimales de 1/7.",
    "Escribe la matriz nula de 16x16.",
    "Una tabla vacía de 20 filas.",
    "Cuenta del 1 al 300.",
    "Scrivi ciao 100 volte.",
    "Escreva olá 100 vezes.",
]
NOT_ASKED = [
    "Tom is 3 times as old as Ann, who is 7. How old is Tom?",
    "How many times does the letter r occur in strawberry?",
    "Explain the moon to a child, step by step, with many details.",
    "Write a long story about a lighthouse.",
    "List ten facts about whales and say why each matters.",
    "Write a function that reverses a linked list.",
    "What is the sum of the first 50 odd numbers?",
    "Sort these words: sleep, serves, hygiene, attached.",
    "Prove that the square root of 2 is irrational.",
    "A ball is drawn 3 times. What is the probability of two reds?",
    "请写一篇关于月亮的长文。",
    "小明的年龄是小红的3倍，小红7岁，小明几岁？",
    "求 x 的三次方程的解。",
    "Tom ist 3 Mal so alt wie Ann. Wie alt ist er?",
    "Erkläre einem Kind den Mond.",
    "Combien de fois la lettre r apparaît-elle dans strawberry ?",
    "¿Por qué es salado el mar?",
    "Cuéntame de la historia de 1939.",
]


@pytest.mark.parametrize("text", ASKED)
def test_a_question_may_ask_for_repetition(text: str) -> None:
    assert asks_for_repetition(text)


@pytest.mark.parametrize("text", [question for question, _ in REQUESTED])
def test_every_question_of_the_bench_is_recognised(text: str) -> None:
    assert asks_for_repetition(text)


def test_of_a_long_text_the_ends_are_read() -> None:
    """What is in the middle is a paste, and has no wishes."""
    paste = "A line of a log that says nothing. " * 100
    assert asks_for_repetition(f"Write the last line 100 times.\n{paste}")
    assert asks_for_repetition(f"{paste}\nWrite the last line 100 times.")
    assert not asks_for_repetition(f"{paste}\nWrite the last line 100 times.\n{paste}")


@pytest.mark.parametrize("text", NOT_ASKED)
def test_most_do_not(text: str) -> None:
    assert not asks_for_repetition(text)
