"""Mathematical answers: finding the final one in a response, and whether it equals the expected one.

Symbolic comparison is ``math_verify``'s, on text that models wrote: it may take for ever or all memory. It is therefore
called in worker processes only (``grading``), with a time limit; this module imports nothing heavy, so that they
start fast. What two plain numbers are is decided here, exactly and at once.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

# No final answer is longer; gigabytes of digits are not worth a look.
LONGEST_ANSWER = 400
MOST_OPENINGS = 20

_STATED = re.compile(
    r"(?:final\s+answer|answer|result)\s*(?:is|are|was|:|=)+\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE
)
_HASHES = re.compile(r"####\s*(?P<answer>[^\n]+)")
_NUMBER = re.compile(r"[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%)?")
_PLAIN = re.compile(r"[-+]?(?:\d+/\d+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)")
_FRACTION = re.compile(r"(?P<sign>[-+]?)\\[dt]?frac\{(?P<top>-?\d+)\}\{(?P<bottom>-?\d+)\}")
_MIXED = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d+)\s*(?:\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|\s(?P<a>\d+)/(?P<b>\d+))"
)
_SCIENTIFIC = re.compile(
    r"(?P<factor>[-+]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|[x×*·])\s*10\s*\^\s*\{?\s*(?P<power>[-+−]?\d{1,3})\s*\}?"
)
_UNIT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi))\s*\\?(?:dollars?|cents?|degrees?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|"
    r"(?:square\s+|cubic\s+|sq\.?\s+)?(?:units?|meters?|metres?|miles?|inches|feet|foot|yards?|kilometers?|centimeters?)|"
    r"kilograms?|grams?|pounds?|liters?|litres?|people|students|eggs|apples|books|km/h|mph|kmh|cm|mm|km|kg|lbs?|"
    r"ft|(?<=\s)[mgsJKNVW])(?:\s*\^\s*\{?[23]\}?|[²³])?\s*$",
    re.IGNORECASE,
)
_LEADING_VARIABLE = re.compile(
    r"^\\?[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z]\))?\s*(?:=|\\approx|≈|\\in(?![a-z])|∈)\s*(?=[^=]+$)"
)


def extract_final_answer(response: str) -> str | None:
    """The final answer of a response, as text: boxed, after ####, stated ("the answer is …"), or the last number.

    What comes before the end of a thinking part (``</think>``) does not count, if anything comes after it.
    """
    text = response
    if "</think>" in text and (after := text.rsplit("</think>", 1)[1]).strip():
        text = after
    boxed = _last_boxed(text)
    if boxed is not None:
        return _shortened(boxed)
    for pattern in (_HASHES, _STATED):
        if matches := list(pattern.finditer(text[-20_000:])):
            return _shortened(_first_clause(matches[-1]["answer"]))
    numbers = _NUMBER.findall(text[-20_000:])
    return _shortened(numbers[-1]) if numbers else None


def expected_answer(text: str) -> str:
    """The answer in a data set's answer field, which may be a worked solution that ends in one."""
    if "####" in text or "\\boxed" in text:
        return extract_final_answer(text) or text.strip()
    return text.strip()


def _last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{…}`` or ``\\fbox{…}``; only the last few openings are tried."""
    ends, tries = len(text), 0
    while (tries := tries + 1) <= MOST_OPENINGS and (
        start := max(text.rfind("\\boxed", 0, ends), text.rfind("\\fbox", 0, ends))
    ) >= 0:
        ends = start
        brace = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start)
        if brace is None or brace.end() >= len(text):
            continue
        if text[brace.end()] != "{":
            if text.startswith("\\boxed ", start):
                return text[brace.end() :].split()[0].rstrip("$.")
            continue
        depth = 0
        for position in range(brace.end(), min(len(text), brace.end() + 10 * LONGEST_ANSWER)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[brace.end() + 1 : position]
    return None


def _first_clause(text: str) -> str:
    """Up to the end of the sentence: a full stop that is followed by a space or nothing, and not within $…$."""
    text = text.strip().strip("*").strip()
    if text.startswith("$") and (end := text.find("$", 1)) > 0 and not text[1 : end + 1].strip("$").isspace():
        inner = text[1:end]
        if inner:
            return inner
    clause = re.split(r"\.(?=\s|$|\*)|\s+(?:because|since|so that|which)\s|\*\*|[!;]", text, maxsplit=1)[0]
    return clause.strip()


def _shortened(text: str) -> str:
    return text.strip()[: LONGEST_ANSWER + 1]


def normalize(answer: str) -> str:
    """The answer without decoration: dollar signs, text commands, spacing, units, thousands separators, "x =" before."""
    text = answer.strip()
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    text = re.sub(r"(?<!\\)\\\s", " ", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\\[,!;: ](?=\d{3}(?!\d))", "", text)
    text = text.strip().strip("*").rstrip(".,;:").strip()
    text = _LEADING_VARIABLE.sub("", text)
    for _ in range(2):
        text = _UNIT.sub("", text).strip()
    return re.sub(r"\s+", " ", text)


_REPLACEMENTS = (
    ("\\$", ""),
    ("$", ""),
    ("\\(", ""),
    ("\\)", ""),
    ("\\[", ""),
    ("\\]", ""),
    ("−", "-"),
    ("–", "-"),
    ("\\left", ""),
    ("\\right", ""),
    ("{,}", ""),
    ("\\!", ""),
    ("\\,", " "),
    ("\\;", " "),
    ("~", " "),
    ("^\\circ", ""),
    ("^{\\circ}", ""),
    ("°", ""),
    ("€", ""),
    ("£", ""),
)


def as_number(answer: str) -> tuple[Fraction, bool] | None:
    """The exact value of a plain number and whether it is a percentage; None if it is anything else."""
    text = normalize(answer)
    percent = bool(re.search(r"(?:\\?%|\s*percent)$", text))
    text = re.sub(r"(?:\\?%|\s*percent)$", "", text).strip()
    if len(text) > 60:
        return None
    try:
        if _PLAIN.fullmatch(text):
            return Fraction(text), percent
        if match := _FRACTION.fullmatch(text):
            value = Fraction(int(match["top"]), int(match["bottom"]))
            return (-value if match["sign"] == "-" else value), percent
        if match := _MIXED.fullmatch(text):
            top, bottom = int(match["top"] or match["a"]), int(match["bottom"] or match["b"])
            value = int(match["whole"]) + Fraction(top, bottom)
            return (-value if match["sign"] == "-" else value), percent
        if match := _SCIENTIFIC.fullmatch(text):
            return Fraction(match["factor"]) * Fraction(10) ** int(match["power"].replace("−", "-")), percent
    except (ValueError, ZeroDivisionError):
        return None
    return None


def equal_at_once(answer: str, expected: str) -> bool | None:
    """Whether two answers are equal, where that is plain to see; None where it needs symbolic comparison.

    Numbers are equal if they are, or if a decimal is the other rounded to its own four or more significant digits.
    50 %, 0.5 and 50 are the same answer where one of them has a percent sign.
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    one, other = as_number(answer), as_number(expected)
    if one is not None and other is not None:
        (a, a_percent), (b, b_percent) = one, other
        if _close(a, b, answer, expected):
            return True
        if a_percent != b_percent:
            return _close(a / 100, b, answer, expected) if a_percent else _close(a, b / 100, answer, expected)
        return False
    left, right = (re.sub(r"\s+", "", normalize(text)).casefold() for text in (answer, expected))
    if left == right and left:
        return True
    if re.fullmatch(r"[a-z]+", left) and re.fullmatch(r"[a-z]+", right):
        return False  # two different words or letters
    return None


def _close(a: Fraction, b: Fraction, *texts: str) -> bool:
    if a == b:
        return True
    for text, value, exact in ((texts[0], a, b), (texts[1], b, a)):
        digits = re.fullmatch(r"[-+]?(\d*)\.(\d+)", normalize(text))
        if digits and len((digits[1] + digits[2]).lstrip("0")) >= 4:
            places = len(digits[2])
            if abs(value - exact) <= Fraction(1, 2 * 10**places):
                return True
    return False


def symbolically_equal(answer: str, expected: str) -> bool:
    """``math_verify``'s verdict. Runs in a worker process: it may not end."""
    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    sides = []
    for text in (expected, answer):
        clean = normalize(text)
        if "," in clean and not clean.startswith(("(", "[", "\\{", "{")):
            clean = f"\\{{{clean}\\}}"  # a list of values, in any order
        sides.append(parse(f"${clean}$", configs, parsing_timeout=0))
    gold, target = sides
    if not gold or not target:
        return False
    if verify(gold, target, timeout_seconds=0, allow_set_relation_comp=True):
        return True
    return _rounds_to(answer, gold[0]) or _rounds_to(expected, target[0])


def _rounds_to(text: str, expression: Any) -> bool:
    """Whether a decimal of four or more significant digits is a symbolic number, rounded."""
    digits = re.fullmatch(r"[-+]?(\d*)\.(\d+)", normalize(text))
    if (
        not digits
        or len((digits[1] + digits[2]).lstrip("0")) < 4
        or not getattr(expression, "is_number", False)
    ):
        return False
    value = expression.evalf(30)
    return bool(value.is_real and abs(float(value) - float(normalize(text))) <= 0.5 * 10.0 ** -len(digits[2]))
