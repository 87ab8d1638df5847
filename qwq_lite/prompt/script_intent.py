"""Which scripts an answer may use: by the option, or by the languages of the prompt. Pure; knows no tokens.

A reader who wrote in Latin letters, and spoke of nothing that is written otherwise, wants no other letters. Who did is let alone:
"auto" masks either everything that can be masked (`scripts`) or nothing, and one word that speaks of a language, a script, a
translation, an original title or Unicode is enough for nothing. The words are English, with the stems of the commonest in other
languages of Latin or Greek letters. It does not know what a name means: whoever asks for a capital gets it in Latin letters.
Where a word has two meanings that are equally common, it calls for other letters: Thai food does. An order for the answer's own
language does not count where that has Latin letters: "Output English ONLY" stood in the prompts of five of eight real mixed
answers. What a model said earlier calls for nothing, for it was not asked for; letters of its earlier answers do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

from qwq_lite.text import unicode_scripts

AnswerScript = Literal["auto", "any", "latin", "han", "kana", "hangul", "cyrillic", "arabic", "hebrew", "thai"]
_OF_LATIN = (  # languages of Latin or Greek letters, in English
    "English French German Spanish Italian Portuguese Dutch Swedish Norwegian Danish Finnish Icelandic Polish Czech Slovak"
    " Slovene Slovenian Croatian Bosnian Hungarian Romanian Albanian Estonian Latvian Lithuanian Turkish Vietnamese Indonesian"
    " Malay Tagalog Filipino Swahili Zulu Xhosa Yoruba Hausa Igbo Somali Irish Welsh Gaelic Scots Catalan Basque Galician"
    " Breton Esperanto Latin Maltese Afrikaans Hawaiian Maori Samoan Quechua Creole Greek"
)
_LANGUAGES = (
    "Chinese Mandarin Cantonese Hokkien Hakka Wu Shanghainese Taiwanese Japanese Korean Russian Ukrainian Belarusian"
    " Bulgarian Serbian Serbo-Croatian Macedonian Mongolian Kazakh Kyrgyz Tajik Uzbek Turkmen Tatar Bashkir Chechen Chuvash"
    " Ossetian Slavonic Slavic Arabic Persian Farsi Dari Pashto Urdu Kurdish Sorani Sindhi Uyghur Uighur Punjabi Kashmiri"
    " Hebrew Yiddish Ladino Aramaic Syriac Thai Lao Isan Hindi Bengali Bangla Tamil Telugu Kannada Malayalam Marathi Gujarati"
    " Nepali Sinhala Sinhalese Burmese Khmer Tibetan Dzongkha Sanskrit Pali Prakrit Armenian Georgian Amharic Tigrinya"
    " Geez Ge'ez Coptic Sumerian Akkadian Egyptian Ainu Manchu Jurchen Tangut Azerbaijani Azeri"
)
_WORDS = re.compile(
    rf"\b(?:{'|'.join(f'{_OF_LATIN} {_LANGUAGES}'.lower().split())})s?\b"
    # scripts, and the ways to write one in another
    r"|\b(?:kanji|hanzi|hanja|kana|hiragana|katakana|furigana|romaji|pinyin|bopomofo|zhuyin|jyutping|wade-giles|hangul|hangeul"
    r"|cyrillic|devanagari|abjads?|abugidas?|niqqud|tashkeel|sinograms?|ideograph\w*|ideograms?|logograms?|hieroglyph\w*"
    r"|cuneiform|runes?|runic|glyphs?|alphabets?|syllabar\w+|diacritic\w*|calligraph\w*|orthograph\w*|scripts?|cjk"
    r"|writing systems?|han characters?|(?:re)?translat\w*|translit\w*|romani[sz]\w*|latini[sz]\w*|transcri(?:be|bing|ption)\w*"
    r"|(?:app|software|game|web|text|content)\w* locali[sz]ation|internationali[sz]\w*|i18n|l10n|subtitles?"
    r"|locali[sz](?:e[ds]?|ing|ation)(?: of)? (?:\w+ ){0,3}?(?:apps?|strings?|texts?|uis?|interfaces?|messages?|contents?|labels?"
    r"|websites?|games?|versions?|into))\b"
    # languages, and words about words
    r"|\b(?:languages?|(?:bi|multi|tri|mono)?lingual\w*|linguist\w*|dialects?|vernacular\w*|native speakers?"
    r"|etymolog\w*|pronounc\w*|pronunciation\w*|phonetic\w*|loanwords?|cognates?|homophones?|proverbs?|haikus?|tankas?"
    r"|how (?:do|would|can|could|to) (?:you |i |we |one )?say|what(?:'s|’s| is| are)? the (?:\w+ )?(?:word|term|phrase)s? for"
    r"|what (?:is|are|was|were)\b[^.!?\n]{0,40} called in)\b"
    # titles, and names as they were first written
    r"|\b(?:(?:original|native|local|birth)[ -]+(?:names?|text|wording|version|spelling|form|quotes?|quotations?|editions?)"
    r"|(?:original|native|local|real|actual|full|foreign|alternat\w+)[ -]+titles?|titles? (?:of|as)"
    r"|quot(?:e[ds]?|ing) (?:\w+ ){0,3}titles?|(?:films?|movies?|novels?|albums?|series) (?:en)?titled|(?:end|ex|aut)onyms?"
    r"|originally (?:called|named|written|titled|published)|(?:its|their|the) own (?:characters?|letters|writing)"
    r"|in (?:the|its|their) original(?=\s*(?:[^\w\s]|\Z|(?:and|or|please|too|as|with|first|rather)\b))"
    r"|lyrics?|animes?|mangas?|manhwa|manhua|donghua|webtoons?|[kjc]-?(?:pop|dramas?)|kaomojis?|emoticons?)\b"
    # characters as such
    r"|\b(?:unicode|utf-?(?:8|16|32)|code ?points?|mojibake|char(?:acter )?(?:sets?|encodings?)|text encodings?"
    r"|(?:multi|double)-?byte|(?:full|half)-?width|non-?(?:ascii|latin|english)|gb ?(?:2312|18030|k)|big5|shift[-_ ]?jis|sjis"
    r"|euc-(?:jp|kr|cn)|koi8\w*|iso-?8859\w*|windows-?125\d|homoglyphs?|punycode)\b"
    # the same in other languages, by their stems
    r"|\b(?:übersetz|uebersetz|traduc|tradui|traduz|traduç|tradur|vertaal|vertal|översätt|oversett|oversæt|tłumacz|přelož|prelož"
    r"|käännä|fordít|çevir|terjemah|dịch|prevedi|prevod|μετάφρα|μεταφρά"
    r"|chines|chinois|chino|cinese|cinesi|chinês|kinesisk|chiński|čínsk|kiina|kínai|çince|tionghoa|κινέζ|κινεζ"
    r"|japan|japon|giappon|jaapan|japán|jepang|ιαπων|korean|coréen|corean|koreansk|koreań|korej|κορε"
    r"|russ(?!ell|et)|ruso|rusa|ryska|rosyjsk|venäj|orosz|rusça|rusia|ukrain|ucrain|ucran|bulgar|búlgar|serb|kyrill|cyrill|ciril"
    r"|ρωσ|arab(?!le\b|ica|esque)|árab|αραβ|hebrä|hebr|hébr|εβρα|thailänd|thaï|tailand|tajland|ταϊλανδ|persisch|persan|persa"
    r"|sprach|schrift|langue|langage|idioma(?!ti)|lengua|língua|lingua|språk|sprog|język|jazyk|kieli|kielel|nyelv|bahasa|ngôn ngữ"
    r"|γλώσσ|γλωσσ|originaltit)\w*"
    r"|\b(?:titel|titre|título|titulo|titolo|tittel)s? (?:\w+ )?original\w*|\boriginal\w* (?:titel|titre|título|titulo|titolo)"
    r"|\bπρωτότυπ\w*",
)
# What is meant by these is no language, script or title that people write.
_ELSE = re.compile(
    r"\b(?:(?:programming|query|markup|scripting|machine|assembly|formal|body|sign|strong|plain|simple|figurative|functional)"
    r"[ -]languages?|(?:large |natural )?language (?:models?|processing)|natural languages?"
    r"|(?:python|bash|shell|perl|ruby|node|power|build|test|setup|install|deploy|deployment|sql|lua|php|unix|linux|startup|batch"
    r"|short|movie|film|play|tv|screen)[ -]scripts?|scripts? (?:tags?|files?|that|to|which)"
    r"|(?:latin|roman|english) (?:letters?|alphabets?)|english words?|greek letters?|arabic numerals?|chinese remainder theorem"
    r"|polish notation|russian roulette|(?:egyptian|hungarian) (?:fractions?|algorithm)|latin (?:squares?|hypercubes?)"
    r"|(?:job|page) titles?)\b"
    # what stands in code
    r"|</?script\b|\b(?:encoding|charset|coding)[\"']?[ ]?[=:][ ]?[\"']?utf-?(?:8|16|32)\b"
    r"|\b(?:en|de)code\([\"']utf-?(?:8|16|32)[\"']",
)
# Orders for the answer's own language, where that has Latin letters: its name calls for no others. What stands before it may.
_LATIN_ONES = rf"(?:{'|'.join(_OF_LATIN.lower().split())})\b(?: (?:language|text))?(?: +only\b)?"
_ORDER = re.compile(
    r"\b(answers?|reply|replies|respond|responses?|write|speak|output|communicate|use|using|stick to|only|always|in)\b"
    rf"([^.!?\n]{{0,40}}?)\b{_LATIN_ONES}(?:,? (?:and|or|not) {_LATIN_ONES})*",
)
_MOST_KNOWN = 1024
_known: dict[bytes, bool] = {}  # what was found of a text, by its digest: a chat asks of all its texts at each turn


def scripts_to_mask(asked: AnswerScript | None, texts: Iterable[str] | None) -> frozenset[str]:
    """The scripts that the answer may have no letter of.

    asked: the one script that it may have besides Latin and Greek; "kana" may have Han too, for Japanese is written with both;
    "any" masks nothing; None is "auto". texts: system prompt, messages and files, for "auto"; None where they are not known.
    """
    if asked == "any":
        return frozenset()
    if asked is None or asked == "auto":
        free = texts is None or any(map(speaks_of_others, texts))
        return frozenset() if free else unicode_scripts.MASKABLE
    return unicode_scripts.MASKABLE - {asked} - ({"han"} if asked == "kana" else set())


def speaks_of_others(text: str) -> bool:
    """Whether a text has a letter that is neither Latin nor Greek, or a word that may call for one."""
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    found = _known.get(key)
    if found is None:
        found = unicode_scripts.has_other_letters(text) or _calls_for_others(text.lower())
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = found
    return found


def _calls_for_others(text: str) -> bool:
    if _WORDS.search(text) is None:  # nearly always
        return False
    return _WORDS.search(_ORDER.sub(r"\1\2 ", _ELSE.sub(" ", text))) is not None
