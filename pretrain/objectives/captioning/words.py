"""Captions to words, the way the Penn-Treebank tokenizer of the COCO evaluation does it.

Caption metrics move by whole points when words are cut differently, so this follows the Java tool
(lower-cased, punctuation dropped) closely enough that published numbers can be compared: words are
split from clitics ("isn't" -> "is n't"), hyphenated words and abbreviations stay whole, brackets
become -lrb-, runs of marks such as "!!!" stay (the Java list of punctuation misses both).
"""

import re

# Marks that the COCO evaluation drops after tokenisation.
_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})

_REPLACED = str.maketrans(
    {
        "\u2019": "'",
        "\u2018": " ` ",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u20ac": "$",
        "\u00a3": "#",
        "\u00a0": " ",
    }
)

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_IRREGULAR = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
    "y'all": ("y'", "all"),
}

# Words that keep their full stop. "in." or "oz." are not among them.
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|rev|gen|st|jr|sr|vs|etc|ave|blvd|rd|co|inc|corp|ltd|ft|mt|dept|est|jan|feb|"
    "mar|apr|jun|jul|aug|sept|sep|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|sat|sun|bldg|capt|sgt|"
    "lt|col|sen|gov|pres|univ|assn|bros"
)

_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@\w[\w.-]*\.\w+ | @\w+   # addresses
    | &\w+; | <\w+>                                               # mark-up
    | '\d\ds?\b                                                   # '90s
    | '(?:tis|twas|em|cause|n)\b'?
    | \b(?:{_ABBREVIATIONS})\.(?!\w) | \bno\.(?=\s*\d)
    | [^\W\d_](?:\.[^\W\d_])+\b\.? | [^\W\d_]\.(?!\w)             # u.s., p.m., initials
    | \d+[^\W\d_]\w*                                              # 5ft, 1st, 4x4
    | \d+(?:[.,:/-]\d+)*(?:-[^\W\d_]+)*
    | c\+\+ | [^\W_]+(?:[-/._]\w+|'(?!(?:s|re|ve|ll|d|m|t|n)\b)\w+|(?<=n)'t\b)*   # words
    | '(?:s|re|ve|ll|d|m)\b
    | \.{{2,}} | -{{2,}} | [?!]+ | ''|``
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+)(n't)")


def caption_words(caption: str) -> list[str]:
    """The words that caption metrics compare."""
    words: list[str] = []
    for token in _TOKEN.findall(caption.lower().translate(_REPLACED)):
        if token in _IRREGULAR:
            words.extend(_IRREGULAR[token])
        elif match := _CLITIC.fullmatch(token):
            words.extend(match.groups())
        elif token == "&amp;":
            words.append("&")
        elif token not in _DROPPED and token != '"':
            words.append(_BRACKETS.get(token, token))
    return words
