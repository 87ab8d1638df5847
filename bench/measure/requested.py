"""Forty questions whose right answer says the same again and again, each with that answer, made rather than written."""

from __future__ import annotations


def _latex(n: int, diagonal: str = "0", other: str = "0") -> str:
    rows = (" & ".join(diagonal if i == j else other for j in range(n)) for i in range(n))
    return "\\begin{pmatrix}\n" + " \\\\\n".join(rows) + "\n\\end{pmatrix}\n"


def _python(n: int, m: int, value: str = "0") -> str:
    return "[\n" + ",\n".join(f"    [{', '.join([value] * m)}]" for _ in range(n)) + ",\n]\n"


def _table(n: int, m: int, head: str = "") -> str:
    top = "| " + " | ".join(head.split() or [" "] * m) + " |\n" + "|---" * m + "|\n"
    return top + ("|   " * m + "|\n") * n


def _dump(n: int, value: str) -> str:
    return "".join(f"{16 * i:08x}  {' '.join([value] * 8)}  {' '.join([value] * 8)}  |{'.' * 16}|\n" for i in range(n))


def _song(verses: int, refrain: str) -> str:
    return "\n".join(f"Verse {i + 1}: the river number {i + 1} runs.\n\n{refrain}\n" for i in range(verses))


def _bottles(n: int) -> str:
    return "\n".join(
        f"{i} bottles of beer on the wall, {i} bottles of beer. Take one down, pass it around, {i - 1} left.\n"
        for i in range(n, 0, -1)
    )


_LINE = "I must not talk in class.\n"
_REFRAIN = "Row, row, row your boat, gently down the stream.\nMerrily, merrily, life is but a dream."
_BOARD = ("██  " * 4 + "\n" + "  ██" * 4 + "\n") * 8
_HOUSE = "+" + "-" * 78 + "+\n" + ("|" + " " * 78 + "|\n") * 40 + "+" + "-" * 78 + "+\n"
_BRICKS = ("|___" * 16 + "|\n" + "_|__" * 16 + "|\n") * 20
REQUESTED: list[tuple[str, str]] = [
    ("Write the 16x16 zero matrix in LaTeX.", _latex(16)),
    ("Give me the 16×16 identity matrix in LaTeX.", _latex(16, "1")),
    ("Write a 12 by 12 matrix of ones.", _latex(12, "1", "1")),
    ("Show me a 16x16 matrix of zeros as a Python list of lists.", _python(16, 16)),
    ("Print an 8x8 grid of zeros.", ("0 " * 8 + "\n") * 8),
    ("I need a list of 300 zeros.", "[" + ", ".join(["0"] * 300) + "]"),
    ("Initialise a 10 x 10 array with None.", _python(10, 10, "None")),
    ("What does np.zeros((16, 16)) print? Write out the whole array.", _python(16, 16, "0.")),
    ("Write the zero matrix with 16 rows and 8 columns.", _latex(16)),
    ("写出一个16x16的零矩阵。", _latex(16)),
    ("给我一个12阶的单位矩阵。", _latex(12, "1")),
    ("Make an empty Markdown table with 30 rows and 5 columns.", _table(30, 5)),
    ("Create a blank weekly timetable, 24 rows.", _table(24, 8, "Hour Mon Tue Wed Thu Fri Sat Sun")),
    ("I want a blank attendance form for 40 pupils, as a table.", _table(40, 4, "Name Mon Tue Wed")),
    ("Give me a CSV template with 60 empty rows and 6 columns.", "a,b,c,d,e,f\n" + ",,,,,\n" * 60),
    ("请给我一个30行5列的空表格。", _table(30, 5)),
    ('Write "I must not talk in class." 100 times.', _LINE * 100),
    ("Repeat the word banana 500 times.", "banana " * 500),
    ("Print 'All work and no play makes Jack a dull boy.' two hundred times.",
     "All work and no play makes Jack a dull boy.\n" * 200),
    ("Say sorry a thousand times.", "Sorry. " * 1000),
    ("Give me 80 copies of this line: Name: ____ Date: ____", "Name: ____ Date: ____\n" * 80),
    ("把“我错了”写一百遍。", "我错了。\n" * 100),
    ("重复输出“你好”200次。", "你好 " * 200),
    ("Write a song whose refrain comes after each of its 20 verses.", _song(20, _REFRAIN)),
    ("Sing Row, Row, Row Your Boat as a round, 20 times through.", f"{_REFRAIN}\n" * 20),
    ("Write the lyrics of 99 bottles of beer.", _bottles(99)),
    ("Write a mantra that I can chant for ten minutes.", "Om mani padme hum. " * 120),
    ("写一首有副歌的儿歌，副歌唱30遍。", "啦啦啦，我们一起唱歌，啦啦啦。\n" * 30),
    ("Draw an empty box, 80 wide and 40 high, in ASCII art.", _HOUSE),
    ("Draw a brick wall as ASCII art.", _BRICKS),
    ("Draw a chessboard with block characters.", _BOARD),
    ("Show a hex dump of 1 KB of zero bytes.", _dump(64, "00")),
    ("What does xxd show for 512 bytes of 0xff?", _dump(32, "ff")),
    ("Count from 1 to 500.", "\n".join(map(str, range(1, 501)))),
    ("Count down from 300 to 1, one number a line.", "\n".join(map(str, range(300, 0, -1)))),
    ("从1数到300。", "，".join(map(str, range(1, 301)))),
    ("What are the first 600 digits of 1/7?", "0." + "142857" * 100),
    ("Write 1/3 with 600 decimal places.", "0." + "3" * 600),
    ("1/7的小数点后600位是什么？", "0." + "142857" * 100),
    ("Write the drum pattern of this bar for 64 bars: boom chick boom chick.", "boom chick boom chick |\n" * 64),
]  # fmt: skip
