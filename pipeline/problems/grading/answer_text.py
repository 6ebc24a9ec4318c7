"""Parts of a mathematical answer's text: its mathematics, the words and units around it, and its name.

"5 \\text{ cm}" is the mathematics 5 with the unit cm; "x = 12 apples" is 12, named x, with the word apple. Words between
two pieces of mathematics ("5 hours 3 minutes"), or words that state mathematics themselves ("at least 12", "5 squared"),
leave nothing that could be compared but the text as it stands: such a reading is not ``certain``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from tropd.pipeline.problems.grading.answer_words import (
    DECISIVE,
    LETTER_UNITS,
    SCALES,
    SHORT_WORDS,
    SILENT,
    UNITS,
)

_FUNCTIONS = (
    "arcsin|arccos|arctan|arccot|arcsec|arccsc|arsinh|arcosh|artanh|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|"
    "log|ln|exp|gcd|lcm|max|min|det"
)
_UPRIGHT = re.compile(
    r"\\(?:text|textrm|textbf|textit|textnormal|mathrm|mathbf|mathit|mbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_REPLACEMENTS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle|\\!|\{,\}|[​\ufeff]", ""),
        (r"\\(?:quad|qquad|,|;|:)|\\?~|(?<!\\)\\\s|[\u00a0\u2009\u202f]", " "),
        (r"[−–]", "-"),
        (r"×", r"\\times "),
        (r"÷", r"\\div "),
        (r"π", r"\\pi "),
        (r"∞|(?<![\\A-Za-z])inf(?:inity|ty)?(?![A-Za-z])", r"\\infty "),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"½", r"\\frac{1}{2}"),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(-?)\s*(?:\\\$|^\s*\$(?=[^$]*$))\s*(?=[\d.])", r" dollars \1"),
        (r"(?<=\d)\s*\\?\$(?=\s*$)(?<!\$\d\$)", " "),
        (r"\\\$", " dollars "),
        (r"(-?)€\s*(?=\d)", r" euros \1"),
        (r"(-?)£\s*(?=\d)", r" sterling \1"),
        (r"€", " euros "),
        (r"£", " sterling "),
        (r"\$|\\\(|\\\)|\\\[|\\\]", ""),
        (r"\\?\bper\s?cent(?:age)?\b|\\?\bpct\b", r"\\%"),
        (r"(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|°)(?=\s*[CF]?[\s.,;]*$|\s+[A-Za-z])", " degrees "),
        (r"°", r"^\\circ "),
        (r"^\s*(?:\\?#|No\.)\s*(?=\d)", ""),
        (r"(?<=\d)(?:\s*\^\s*\{?\s*(?:\\text\s*\{)?)?(?:st|nd|rd|th)(?![A-Za-z])\s*\}*", ""),
        (r"^\s*(?:\\text(?:bf)?\s*\{)\s*\(?[A-J]\)\s*\}(?=\s*[\d\\(-])", ""),
    )
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\\[,!;: ]|\{,\})\d{3})+(?![\d]|,\d)")
_NAME = re.compile(
    r"(?P<name>\\?[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?|[A-Za-z][A-Za-z ]*[A-Za-z]{2})\s*"
    r"(?:=|:(?!\s*\d+\s*$)|\\approx|≈|\\in(?![a-z])|∈)\s*(?=[^=]+$)"
)
_APPROXIMATE = re.compile(r"^(?:\\approx|\\simeq|\\sim|≈)\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+(?:['’][a-z]+)?")
_LAST_WORD = re.compile(
    r"(?P<join>\s*(?:/|\\cdot(?![a-z])|·|\*|-|,)\s*|\s+|(?<![\\A-Za-z]))(?P<word>(?<![\\A-Za-z])[A-Za-z]+(?:['’][a-z]+)?)"
    r"(?P<power>\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?[\s.,;]*$"
)
_FIRST_WORD = re.compile(r"\s*(?P<word>[A-Za-z]+(?:['’][a-z]+)?)(?:[\s,;:]+|$)")
# "and" and "or" between two pieces of mathematics.
_LISTED = re.compile(
    r"(?:(?<=[\d})\]])|(?<=(?<![A-Za-z])[A-Za-z]))\s*,?\s+(?:and|or)\s+(?=[\d\\({\[+-]|[A-Za-z](?![A-Za-z]))"
)
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant|ne|neq)(?![a-z])|≠")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}")

_PHRASES = (
    (re.compile(r"(?<![A-Za-z])(?:miles?\s+per\s+hour|mi\s*/\s*hr?)(?![A-Za-z])"), "mph"),
    (re.compile(r"(?<![A-Za-z])(?:kilomet(?:er|re)s?|km)\s*(?:per|/)\s*(?:hour|hr|h)(?![A-Za-z])"), "kmh"),
    (re.compile(r"(?<![A-Za-z])(?:sq\.?|square)\s+([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"(?<![A-Za-z])(?:cu\.?|cubic)\s+([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"(?<![A-Za-z\d])([A-Za-z]+)\s+squared(?![A-Za-z])"), r"\1^2"),
    (re.compile(r"(?<![A-Za-z\d])([A-Za-z]+)\s+cubed(?![A-Za-z])"), r"\1^3"),
)


@dataclass(frozen=True)
class Reading:
    """An answer's parts.

    Attributes:
        text: all of it, words in the singular, without spaces: for equality as text.
        core: the mathematics between the words.
        whole: the same with units of one letter left in place, which may be variables ("2 m").
        words: units and other words around the mathematics, in the singular.
        name: the name given to the mathematics ("x", of "x = 3"); empty if none.
        scale: the factor that words multiply it by ("million").
        certain: whether ``core`` and ``scale`` are all that the words leave to compare.
    """

    text: str
    core: str
    whole: str
    words: frozenset[str]
    name: str
    scale: int
    certain: bool


def read_answer(answer: str) -> Reading:
    """Take an answer apart."""
    text = _plain(answer)
    name = ""
    if match := _NAME.match(text):
        name, text = re.sub(r"\s|[{}]", "", match["name"]), text[match.end() :]
    text = _APPROXIMATE.sub("", text)
    listed = _LISTED.sub(",", text)
    core, words = listed, []
    while (taken := _without_last_word(core)) is not None:
        core, word = taken
        words.append(word)
    while (taken := _without_first_word(core)) is not None:
        core, word = taken
        words.append(word)
    core = core.strip().strip(",;:").strip()
    scale = math.prod(SCALES.get(word, 1) for word in words)
    certain = (
        not DECISIVE & set(words)
        and not _has_words(core)
        and not _DATE.fullmatch(core)
        and (scale == 1 or bool(core))
        and (listed == text or not _INEQUALITY.search(core))  # "and" and "or" are two things there
    )
    return Reading(
        text=_as_text(text),
        core=core,
        whole=listed if all(len(word) == 1 for word in words) else core,
        words=frozenset(words) - SCALES.keys() - SILENT,
        name=name,
        scale=scale,
        certain=certain,
    )


def same_words(one: Reading, other: Reading) -> bool:
    """True if no words of one answer contradict the other: a unit may be left out, but not another."""
    a, b = one.words, other.words
    if not a or not b:
        return True
    known = {*UNITS.values(), "per"}
    units_a, units_b = ({word for word in words if word.partition("^")[0] in known} for words in (a, b))
    return units_a == units_b and (a <= b or b <= a)


def same_name(one: Reading, other: Reading) -> bool:
    """True if two answers may be of the same thing: x = 3 is not y = 3, but y = x^2 may be f(x) = x^2."""
    a, b = one.name, other.name
    return not a or not b or a == b or (a == "y" and "(" in b) or (b == "y" and "(" in a)


def _plain(answer: str) -> str:
    """Without dollar signs, spacing commands, separators of thousands; functions as commands; upright text as text."""
    text = answer.strip()
    if boxed := re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, re.DOTALL):
        text = boxed[1]
    for pattern, new in _REPLACEMENTS:
        text = pattern.sub(new, text)
    text = _UPRIGHT.sub(_upright, text)
    text = re.sub(
        rf"(?<![\\A-Za-z])(?=(?:{_FUNCTIONS})\s*[({{])|(?<![\\A-Za-z])(?=(?:sqrt)\s*[({{\d])", r"\\", text
    )
    text = re.sub(r"(?<![\\A-Za-z])(?=(?:sin|cos|tan|log|ln)\s*[\\\dA-Za-z]\b|pi\b)", r"\\", text)
    text = re.sub(
        r"\\(frac|binom)\s*(\d|[a-z](?![A-Za-z]))\s*(\d|[a-z](?![A-Za-z]))(?!\d)", r"\\\1{\2}{\3}", text
    )
    text = _THOUSANDS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text)
    for phrase, short in _PHRASES:
        text = phrase.sub(short, text)
    return re.sub(r"\s+", " ", text.strip().strip("*").strip().rstrip(".,;:").strip())


def _upright(match: re.Match[str]) -> str:
    inside = match[1].strip()
    if re.fullmatch(_FUNCTIONS, inside):
        return f"\\{inside} "
    return f" {inside} "


def _as_text(text: str) -> str:
    text = _WORD.sub(lambda match: _singular(match[0]) if _is_word(match[0]) else match[0], text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text.replace(" ", ""))


def _is_word(letters: str) -> bool:
    return len(letters) >= 3 or letters in SHORT_WORDS


def _singular(word: str) -> str:
    """A word or unit as it is compared: ``apples`` → ``apple``, ``centimeters`` → ``cm``."""
    if word in UNITS:
        return UNITS[word]
    word = word.lower()
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return UNITS.get(word, word)


@lru_cache(maxsize=1024)  # it calls itself for the text before
def _without_last_word(text: str) -> tuple[str, str] | None:
    """A text without the unit or word that it ends in, and that; None if it ends in mathematics."""
    match = _LAST_WORD.search(text)
    if match is None:
        return None
    before, join, letters, power = text[: match.start()], match["join"].strip(), match["word"], match["power"]
    unit = _singular(letters) if letters in UNITS or _singular(letters) in UNITS.values() else ""
    if _is_open(before) or (power and not unit):
        return None
    rate = join == "/" and len(letters) > 2 and before[-1:].isdigit()  # "12/day"
    if (
        join and not rate and not (before and _without_last_word(before))
    ):  # "5 m/s", but not "5/s" and "3 - apples"
        return None
    if not join and before.rstrip().endswith(tuple("+-*/^_=<>|(&\\")):
        return None
    if not match["join"] and before and not (unit and len(letters) > 1):  # "5cm", but not "5xyz"
        return None
    if len(letters) == 1:
        after = re.search(r"(?:[\d})\]]|\\pi)\s*$", before) or _without_last_word(before)
        if letters not in LETTER_UNITS or not after:
            return None
    elif not _is_word(letters) and not unit:
        return None
    word = (unit or _singular(letters)) + re.sub(r"[\s{}]", "", power or "")
    if join == "/":
        word = f"per {word}"
    return before, word


def _without_first_word(text: str) -> tuple[str, str] | None:
    """A text without the word that it begins with, and that; None if it begins with mathematics."""
    match = _FIRST_WORD.match(text)
    if match is None:
        return None
    letters, rest = match["word"], text[match.end() :]
    article = letters in ("a", "A", "I") and re.match(r"[A-Za-z]{2,}", rest)
    if not (_is_word(letters) or article) or re.match(r"[+*/^_=<>|]|-\s", rest):
        return None
    return rest, _singular(letters)


def _is_open(text: str) -> bool:
    """True if a brace or parenthesis is open at the end of a text."""
    return any(text.count(left) > text.count(right) for left, right in ("{}", "()"))


def _has_words(mathematics: str) -> bool:
    """True if words stand between pieces of mathematics."""
    return any(
        _is_word(match[1]) for match in re.finditer(r"(?<![^\s\d])([A-Za-z]{2,})(?![^\s,.])", mathematics)
    )
