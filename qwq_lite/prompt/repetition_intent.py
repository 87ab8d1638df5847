"""Whether a prompt asks for repetition, which the loop rule would end. Pure, over text.

English and Chinese; of German, French, Spanish, Italian, Portuguese and Dutch the commonest stems.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

_NEAR, _SENTENCE = r"[^.?!\n]{0,40}\b", r"[^.?!\n]{0,200}\b"
_NUMBER = (
    r"(?:\d[\d,]*|ten|twelve|fifteen|twenty|thirty|forty|fifty|sixty|(?:a|one|two|three|five) (?:hundred|thousand)"
    r"|hundreds of|many)"
)
_WRITE = (
    r"(?:writ|print|typ|say|repeat|output|list|cop[yi]|sing|chant|put|display|produc|generat|giv|mak|draw(?!n)|show|return"
    r"|echo)"
)
_SIZE = r"\b\d{1,3} ?(?:x|×|by|\\times) ?\d{1,3}\b"
_ARRAY = r"(?:matri(?:x|ces)|arrays?|grids?|tensors?|tables?|boards?|lists?|vectors?|rows?|strings?)\b"
_FORM = r"(?:table|grid|form|calendar|template|worksheet|spreadsheet|csv|chart|schedule|timetable|map|list|matrix|array)s?\b"
_ENGLISH = (
    # Copies by their number. "3 times as old" and "how many times" are sums, so a verb of writing must be near.
    rf"\b{_WRITE}\w*\b{_SENTENCE}{_NUMBER} (?:times|copies|repetitions|lines|rows)\b(?! as\b)",
    rf"\b{_NUMBER} (?:copies|repetitions|identical|repeated|lines of|rows of|blank|empty)\b",
    r"\brepeat(?:edly|ing)\b|\brepeat\b(?! (?:the|your) (?:question|mistake|error))|\bover and over\b|\bagain and again\b",
    # Matrices and tables that are the same all over.
    r"\b(?:zero|null|identity|unit|diagonal|sparse|all[- ]zeros?|all[- ]ones|constant) (?:matri|vector|array|tensor|grid|block)",
    rf"\b{_ARRAY}{_NEAR}(?:zeros?|ones|blanks?|spaces|identical)\b|{_SIZE}{_NEAR}(?:{_ARRAY}|identity|zeros?)",
    rf"\b{_ARRAY}[^.?!\n]{{0,40}}{_SIZE}|\b(?:empty|blank)\b{_NEAR}{_FORM}|\b{_FORM}{_NEAR}(?:empty|blank)\b",
    r"\b(?:zeros|ones|full)\(|\b(?:checker|chess)board\b|\bmultiplication table\b",
    # Verse, pictures, dumps, digits.
    r"\b(?:refrain|chorus(?:es)?|lyrics|mantra|litany|chant|nursery rhyme|villanelle|lullaby|jingle|bottles of beer|song)\b",
    r"\bascii[- ]?(?:art|table|diagram|picture|drawing|box)|\bhex(?:adecimal)? ?dump|\bxxd\b|\bbinary dump",
    r"\bcount(?:ing|down)?\b[^.?!\n]{0,20}\b(?:from|up|down|to)\b[^.?!\n]{0,20}\d|\bnumbers from\b",
    r"\b(?:digits|decimal (?:places|expansion)|decimals) of\b|\b\d+ (?:digits|decimal places|decimals)\b|\brecurring decimal",
    r"\bpatterns? of\b|\bfill(?:ed|er)? (?:it |them |up |in )?with\b|\bpadd(?:ed|ing) with\b|\b(?:drum|beat) pattern\b",
)
_CHINESE_NUMBER = r"(?:\d+|[一二两三四五六七八九]?[十百千万][一二三四五六七八九十百千万]*)"
_CHINESE = (
    rf"{_CHINESE_NUMBER} ?(?:遍|次(?!方|幂|数)|份|行)",
    r"重复(?!的?(?:问题|错误))|反复|一遍又一遍|循环(?:小数|输出|打印)",
    r"(?:零|全零|全0|全1|单位|对角|空)(?:矩阵|向量|数组|张量)|全(?:是|为|都是)?[零0一1]的?(?:矩阵|数组|表)",
    r"\d+ ?[x×*乘] ?\d+ ?的?[^。？！\n]{0,10}(?:矩阵|表格|网格|棋盘|数组)",
    r"空白?的?[^。？！\n]{0,10}(?:表|网格|日历|模板)|空表|棋盘|乘法表",
    r"副歌|叠句|歌词|儿歌|童谣|咒语|ascii ?(?:艺术|图|画|字符画)|字符画|十六进制(?:转储|dump)",
    r"(?:从 ?\S{1,4} ?)?数到|倒数到|倒计时|小数点?后[^。？！\n]{0,8}位|前[^。？！\n]{0,6}位小数",
)
_TIMES = r"(?:mal|fois|veces|vezes|volte|keer|maal)\b"
_ELSEWHERE = (
    # Copies by their number; "dreimal so alt" is a sum.
    rf"\b\d[\d.]* ?{_TIMES}(?! (?:so|plus|moins|más|menos|più|mais|zo)\b)|\b(?:zehn|zwanzig|fünfzig|hundert|tausend)mal\b",
    rf"\b(?:dix|vingt|cinquante|cent|mille|diez|veinte|cincuenta|cien|mil|dieci|venti|cento|dez|vinte|cem|honderd) {_TIMES}",
    r"\b(?:wiederhol|répét|répèt|repet[ei]|repit[ae]|ripet|herhaal)\w*|\bimmer wieder\b|\buna y otra vez\b|\bencore et encore\b",
    # Matrices and tables that are the same all over.
    r"\b(?:null|einheits|einser|identitäts|diagonal)matri\w*|\bmatri[zc]\w*[^.?!\n]{0,20}\b(?:null?[aeo]?|nul\w*|zéros?|ceros?"
    r"|zeros?|zeri|unos?|identi\w*|unidad|unité|diagonal\w*)\b|\b(?:nullen|einsen|zéros|ceros|zeri|nullen)\b",
    rf"{_SIZE}[^.?!\n]{{0,40}}\b(?:matri|tab[el]|grille|gitter|raster|cuadr|quadr)|\b(?:matri|tab[el]|grille|gitter|raster|cuadr"
    rf"|quadr)\w*[^.?!\n]{{0,40}}{_SIZE}",
    r"\b(?:leer|vide|vací|vazi|vuot|lege)\w*[^.?!\n]{0,40}\b(?:tab[el]|grille|gitter|raster|formul|kalender|calend|vorlage"
    r"|modèle|plantilla|modelo|modello|list)|\b(?:tab[el]|grille|gitter|raster|formul|kalender|calend|vorlage|modèle|plantilla"
    r"|modelo|modello|list)\w*[^.?!\n]{0,40}\b(?:leer|vide|vací|vazi|vuot|lege?)",
    r"\b(?:schachbrett|échiquier|ajedrez|scacchi|xadrez|schaakbord|einmaleins)",
    # Verse, pictures, counting, digits.
    r"\b(?:kehrreim|refrão|estribillo|ritornello|kinderlied|liedtext|comptine|chanson|canción|canzone|canção|paroles)",
    r"\bascii[- ]?(?:kunst|bild|zeichn)|\b(?:arte?|dessin|dibujo|disegno|desenho) ascii\b",
    r"\b(?:zähl|compte[rz]?|cuenta|contar|conta|tel)\w*\b[^.?!\n]{0,20}\b(?:von|bis|de|à|del|desde|hasta|da|até|van|tot)\b"
    r"[^.?!\n]{0,20}\d",
    r"\b(?:nachkommastell|dezimalstell|décimales|decimales|decimali|decimais|decimalen|ziffern|chiffres|dígitos|cifre)",
)
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|(?<!\w)'[^'\n]*'(?!\w)")
_END = 1000  # characters


def asks_for_repetition(text: str) -> bool:
    """Whether an answer may rightly say the same again and again: copies, a matrix of zeros, an empty table, a refrain, digits.

    It errs towards yes: then an answer that loops ends at its limit, as it would without the rule. Of a long text, which is
    mostly a paste, only the ends are read.
    """
    ends = (text,) if len(text) <= 2 * _END else (text[:_END], text[-_END:])
    return any(map(_asks, ends))


@lru_cache(256)  # a conversation asks the same of its first messages at each turn
def _asks(text: str) -> bool:
    return _repetition().search(_QUOTED.sub('""', text.lower())) is not None


@cache  # compiled where it is first asked for: the process beside the engine never does
def _repetition() -> re.Pattern[str]:
    return re.compile("|".join((*_ENGLISH, *_ELSEWHERE, *_CHINESE)))
