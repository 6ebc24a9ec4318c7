"""Multiple choice: the letter that a response declares, and the letter that a data set's answer field means.

A declared option ("the answer is B", "I think it is (b).", a box) wins over every option that is named elsewhere,
and the last declaration over earlier ones. Without one, a letter alone on a line counts, or the only one that the last
sentence names. Two letters declared together, or a declaration that is taken back, are no answer.
"""

from __future__ import annotations

import re

from tropd.pipeline.problems.grading.math_answers import SEARCHED, without_thinking

# A letter as an option is written: B, (B), B., **B**, $B$, \text{B}; in lower case only where it cannot be a word.
_LETTER = (
    r"[\s*_$:\"'`]{0,9}+(?:\\(?:text|mathrm|mathbf|textbf|boxed)\s?\{\s?){0,3}+[\s*_$\"'`]{0,9}+"
    r"(?:(?P<{0}bracket>[(\[])\s*(?P<{0}bracketed>[A-Ja-j])\s*[)\]]"
    r"|(?P<{0}upper>[B-HJ])(?![\w'’+#-])"
    r"|(?P<{0}any>[A-Ja-j])(?=\s*(?:[.)\]},;:*$\"!]|\n|$|\s(?:because|since|as|and|or|rather|instead|not)\b)))"
)


def _letter(name: str = "") -> str:
    return _LETTER.replace("{0}", name)


_OPTION = r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*)?"
_DECLARED = re.compile(
    r"(?:"
    r"(?:answer|antwort|choice|option|solution|réponse|respuesta)(?:\s+(?:to|for)\s+[^.\n]{0,60}?)?\s*\**\s*"
    r"(?:(?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|ist|est|es|:|=|：|->|→)\s*)+(?:clearly|therefore|thus|probably|likely|most\s+likely|indeed|definitely)?,?"
    r"|答案(?:是|为|為|：|:)+"
    r"|(?:i(?:'d|\s+would)?\s+(?:choose|pick|select|go\s+with|say|guess|answer)|i\s+think|i\s+believe|i'm\s+going\s+with)"
    r"(?:\s+that)?(?:\s+(?:it\s+is|it's|it\s+must\s+be|it\s+would\s+be|it\s+should\s+be))?"
    r"|(?:so|thus|therefore|hence|then|must\s+be|think)[, ]+(?:it\s+is|it's|it\s+must\s+be|it\s+should\s+be)"
    r"|(?:^|[.!?]\s+)(?:it\s+is|it's|it\s+must\s+be)"
    r")\s*(?P<negated>not\s+)?" + _OPTION + _letter(),
    re.IGNORECASE | re.MULTILINE,
)
_IS_RIGHT = re.compile(
    _letter()
    + r"[*_$}]{0,9}\s(?:is|must\s+be|seems|would\s+be)\s+(?:clearly\s+|therefore\s+|thus\s+|indeed\s+)?(?:the\s+)?"
    r"(?:only\s+|most\s+|best\s+|final\s+)?(?:correct|right|answer|true\s+(?:option|answer|statement)|best)(?!\s+(?:because\s+)?not)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"(?:^|[.!?]\s+|\n)(?:so|thus|therefore|hence|then)[,:]?\s+" + _OPTION + _letter() + r"[\s.*$})\]]{0,9}$",
    re.IGNORECASE,
)
_ALONE = re.compile(
    r"^[ *_$#>]{0,9}(?:\\text\{)?[(\[]?(?P<letter>[A-Ja-j])[)\]]?[.:]?[ *_$}]{0,9}$", re.MULTILINE
)
_OPENING = re.compile(r"\s*\**[(\[]?(?P<letter>[A-J])(?:[)\]]|[.:](?=\s)|,?\s(?=because\b|since\b))\**\s*\S")
_ANOTHER = re.compile(
    r"^[\s*_$)\]}.]*(?:,|/|\bor\b|\band\b|\bund\b|\boder\b)[\s*_$]*(?:option|choice)?\s*" + _letter("other"),
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_IN_BOX = re.compile(
    r"(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)*\s*(?:(?:option|choice|answer)\s*:?\s*)?[(\[]?\s*(?P<letter>[A-Ja-j])\s*"
    r"(?:[)\].:,}\s].*)?\}*",
    re.DOTALL | re.IGNORECASE,
)
_NAMED = re.compile(r"\(\s*([A-Ja-j])\s*\)|(?<![\w'’\\-])([B-HJ])(?![\w'’+#-])")
_EXPECTED = re.compile(r"[\s({\[*$]*(?P<letter>[A-Ja-j])(?:[\s)}\].:*$]*|[)\].:]\s.*)", re.DOTALL)


def extract_choice(response: str, *, cut_off: bool = False) -> str | None:
    """The letter A to J that a response declares, in upper case; None if it declares none, or more than one.

    Args:
        cut_off: the response ended because of its length: a letter at its very end may be the beginning of a word.
    """
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", without_thinking(response)[-SEARCHED:]))
    if cut_off:
        text = re.sub(r"\w+$", "", text)
    boxes = list(_BOX.finditer(text))
    if boxes:
        content = _boxed(text, boxes[-1].end())
        if content is None:
            return None
        if match := _IN_BOX.fullmatch(content.strip()):
            return None if _ANOTHER.match(content.strip()[match.end("letter") :]) else match["letter"].upper()
    declared = sorted(
        (match for pattern in (_DECLARED, _IS_RIGHT, _CONCLUSION) for match in pattern.finditer(text)),
        key=lambda match: match.end(),
    )
    declared = [match for match in declared if not _is_negated(match)]
    if declared:
        last = declared[-1]
        letter = _of(last)
        other = _ANOTHER.match(text[last.end() :])
        return None if other and _of(other, "other") != letter else letter
    if alone := _ALONE.findall(text):
        return str(alone[-1]).upper()
    openings = set(re.findall(r"^\W{0,9}([A-J])[).:]", text, re.MULTILINE))
    if (opening := _OPENING.match(text)) and len(openings) <= 1:
        return opening["letter"].upper()
    return None if len(openings) > 1 else _only_letter(text)


def _only_letter(text: str) -> str | None:
    """The one option that the last sentence names."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z(*])|\n+", text) if re.search(r"\w", part)]
    if not sentences or re.search(r"\bnot\b|n't\b|wrong|incorrect", sentences[-1]):
        return None
    letters = {found.upper() for pair in _NAMED.findall(sentences[-1]) for found in pair if found}
    return letters.pop() if len(letters) == 1 else None


def expected_choice(answer: str) -> str | None:
    """The letter that an answer field means: B, b, (B), "B.", "B) 42", or an index that counts from 0 (1 is B)."""
    text = answer.strip()
    if match := re.fullmatch(r"(\d)(?:\.0+)?", text):
        return "ABCDEFGHIJ"[int(match[1])]
    if boxes := list(_BOX.finditer(text)):
        text = _boxed(text, boxes[-1].end()) or ""
        match = _IN_BOX.fullmatch(text.strip())
    else:
        match = _EXPECTED.fullmatch(text)
    return match["letter"].upper() if match else None


def _boxed(text: str, start: int) -> str | None:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _of(match: re.Match[str], name: str = "") -> str:
    found = match[f"{name}bracketed"] or match[f"{name}upper"] or match[f"{name}any"]
    return str(found).upper()


def _is_negated(match: re.Match[str]) -> bool:
    return bool(match.groupdict().get("negated")) or bool(
        re.search(r"(?:\bnot|n't)\s+(?:\w+\s+)?$", match.string[max(0, match.start() - 20) : match.start()])
    )
