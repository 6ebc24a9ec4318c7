"""Mathematical answers: find the final one in a response, and compare it with the expected one where that is plain.

Numbers, times of day and words are compared here, exactly and at once. Everything else is left to
``symbolic``, which is called in worker processes only; this module imports nothing heavy, so that they start fast.
Undecidable pairs are not equal.
"""

from __future__ import annotations

import re
from fractions import Fraction

from tropd.pipeline.problems.grading.answer_text import Reading, read_answer, same_name, same_words

# No final answer is longer; gigabytes of digits are not worth a look.
LONGEST_ANSWER = 400
MOST_OPENINGS = 20
# Length of the end of a response that is searched for unboxed answers.
SEARCHED = 20_000

_STATED = re.compile(
    r"(?:final\s+answer|answer|result)\s*(?:is|are|was|:|=)+\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE
)
_HASHES = re.compile(r"####\s*(?P<answer>[^\n]+)")
_NUMBER = re.compile(
    r"\d{1,2}:\d{2}(?!\d)|[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%)?"
)
_PLAIN = re.compile(r"[-+]?(?:\d+/\d+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)")
_FRACTION = re.compile(r"(?P<sign>[-+]?)\\frac\{(?P<top>-?\d+)\}\s*\{(?P<bottom>-?\d+)\}")
_MIXED = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d+)\s*(?:\\frac\{(?P<top>\d+)\}\s*\{(?P<bottom>\d+)\}|\s(?P<a>\d+)/(?P<b>\d+))"
)
_SCIENTIFIC = re.compile(
    r"(?P<factor>[-+]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|[x*·])\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d{1,3})\s*\}?"
)
_REPEATING = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*\{?(?P<again>\d+)\}?"
)
_RATIO = re.compile(r"(\d+)\s*:\s*(\d+)")
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s*(?P<half>[ap]\.?\s?m\.?)?",
    re.IGNORECASE,
)


def extract_final_answer(response: str, *, cut_off: bool = False) -> str | None:
    """The final answer of a response, as text: boxed, after ####, stated ("the answer is …"), or the last number.

    Thinking (up to ``</think>``, or from a ``<think>`` that is not closed) holds no answer. A last box that is not
    closed is an answer that is not there.

    Args:
        cut_off: the response ended because of its length: text that reaches its end may be a part of an answer, and
            is none.
    """
    text = without_thinking(response)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()[: LONGEST_ANSWER + 1] or None
    tail = text[-SEARCHED:]
    end = len(tail.rstrip()) if cut_off else len(tail) + 1
    for pattern in (_HASHES, _STATED):
        if matches := list(pattern.finditer(tail)):
            last = matches[-1]
            return None if last.end() >= end else _first_clause(last["answer"])[: LONGEST_ANSWER + 1] or None
    numbers = list(_NUMBER.finditer(tail))
    if not numbers or numbers[-1].end() >= end or _is_embedded(tail, numbers[-1]):
        return None
    return numbers[-1][0].strip()[: LONGEST_ANSWER + 1]


def without_thinking(response: str) -> str:
    """A response without its thinking."""
    return response.rsplit("</think>", 1)[-1].split("<think>", 1)[0]


def expected_answer(text: str) -> str:
    """The answer in a data set's answer field, which may be a worked solution that ends in one."""
    if "####" in text or "\\boxed" in text:
        return extract_final_answer(text) or text.strip()
    return text.strip()


def _is_embedded(text: str, number: re.Match[str]) -> bool:
    """True if a number is only a part of a term: an exponent, an index, the operand of a factorial."""
    before, after = text[: number.start()].rstrip(" "), text[number.end() :].lstrip(" ")
    return before.endswith(("^", "_", "{", "\\sqrt", ":")) or after.startswith(("^", "_", "!", "}"))


def _last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{…}`` or ``\\fbox{…}``; "" if it is not closed or too long; None without one."""
    ends, tries = len(text), 0
    while (tries := tries + 1) <= MOST_OPENINGS and (
        start := max(text.rfind("\\boxed", 0, ends), text.rfind("\\fbox", 0, ends))
    ) >= 0:
        ends = start
        brace = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*").match(text, start)
        if brace is None:
            continue
        if brace.end() >= len(text):
            return ""
        if text[brace.end()] != "{":
            if text.startswith("\\boxed ", start):
                return text[brace.end() :].split()[0].rstrip("$.")
            continue
        depth = 0
        for position in range(brace.end(), min(len(text), brace.end() + 10 * LONGEST_ANSWER)):
            escaped = text[position - 1] == "\\" and text[position - 2] != "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[brace.end() + 1 : position]
        return ""
    return None


def _first_clause(text: str) -> str:
    """Up to the end of the sentence: a full stop that is followed by a space or nothing, and not within $…$."""
    text = text.strip().strip("*").strip()
    if text.startswith("$") and (end := text.find("$", 1)) > 0 and (inner := text[1:end]).strip():
        rest = text[end + 1 :]
        if not re.match(r"\s*(?:,|,?\s*(?:or|and))\s*\$", rest):
            unit = re.match(r"\s*(?!(?:because|since|so|which|where|when|and|for|as|by)\b)[A-Za-z]+", rest)
            return inner + (f" {unit[0].strip()}" if unit else "")
    clause = re.split(
        r"\.(?=\s|$|\*)|\s+(?:because|since|so that|which)\s|\*\*|;|(?<=[a-z]{3})!", text, maxsplit=1
    )[0]
    return clause.strip()


def equal_at_once(answer: str, expected: str) -> bool | None:
    """True or False where it is plain whether two answers are equal; None where it needs symbolic comparison.

    Numbers are equal if they are, or if a decimal is the other rounded to its own four or more significant digits.
    50 %, 0.5 and 50 are the same answer where one of them has a percent sign. A unit, or another word, may be left out
    on one side; another unit, or another word, is another answer.
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    if len(expected) > LONGEST_ANSWER:
        return answer.strip() == expected.strip()
    one, other = read_answer(answer), read_answer(expected)
    if not same_name(one, other):
        return False
    if one.text == other.text:
        return bool(re.search(r"\w|\\|∅", one.text))
    clocks = _as_clock(answer), _as_clock(expected)
    if any(clocks):
        return None not in clocks and _same_time(*clocks)  # type: ignore[arg-type]
    if not (one.certain and other.certain and one.core and other.core and same_words(one, other)):
        return False
    a, b = as_number(one), as_number(other)
    if a is not None and b is not None:
        return _equal_numbers(a, b, one.core, other.core)
    parts = tuple([int(part) for part in re.findall(r"\d+", side.core)] for side in (one, other))
    if all(re.fullmatch(r"\d+(?:\s*:\s*\d+){2,}", side.core) for side in (one, other)):
        x, y = parts
        return len(x) == len(y) and all(x[0] * q == y[0] * p for p, q in zip(x, y, strict=True))
    return None


def comparisons(answer: str, expected: str) -> list[tuple[str, str]]:
    """The pairs of texts of which one has to be equal as mathematics, where ``equal_at_once`` cannot tell."""
    one, other = read_answer(answer), read_answer(expected)
    pairs = [(_scaled(one), _scaled(other))]
    if (one.whole, other.whole) != (one.core, other.core):  # a unit of one letter may be a variable
        pairs.append((one.whole, other.whole))
    return pairs


def _scaled(reading: Reading) -> str:
    return reading.core if reading.scale == 1 else f"({reading.core})\\cdot {reading.scale}"


def as_number(reading: Reading) -> tuple[Fraction, bool] | None:
    """The exact value of a plain number and whether it is a percentage; None if it is anything else."""
    percent = bool(re.search(r"\\?%$", reading.core))
    text = re.sub(r"\\?%$", "", reading.core).strip()
    if len(text) > 60:
        return None
    try:
        value = _value(re.sub(r"^([-+])\s+", r"\1", text))
    except (ValueError, ZeroDivisionError):
        return None
    return None if value is None else (value * reading.scale, percent)


def _value(text: str) -> Fraction | None:
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        return _signed(match["sign"], Fraction(int(match["top"]), int(match["bottom"])))
    if match := _MIXED.fullmatch(text):
        part = Fraction(int(match["top"] or match["a"]), int(match["bottom"] or match["b"]))
        return _signed(match["sign"], int(match["whole"]) + part)
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match["factor"]) * Fraction(10) ** int(match["power"])
    if match := _REPEATING.fullmatch(text):
        places, length = len(match["fixed"]), len(match["again"])
        fixed = Fraction(int(match["whole"] + match["fixed"] or "0"), 10**places)
        return _signed(match["sign"], fixed + Fraction(int(match["again"]), 10**places * (10**length - 1)))
    if match := _RATIO.fullmatch(text):
        return Fraction(int(match[1]), int(match[2]))
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _equal_numbers(one: tuple[Fraction, bool], other: tuple[Fraction, bool], *texts: str) -> bool:
    (a, a_percent), (b, b_percent) = one, other
    if _close(a, b, *texts):
        return True
    if a_percent == b_percent:
        return False
    texts = tuple(re.sub(r"\s*\\?%$", "", text) for text in texts)
    if a_percent:
        return _close(a / 100, b, *texts) or _close(a, b * 100, *texts)
    return _close(a, b / 100, *texts) or _close(a * 100, b, *texts)


def _close(a: Fraction, b: Fraction, *texts: str) -> bool:
    if a == b:
        return True
    for text, value, exact in ((texts[0], a, b), (texts[1], b, a)):
        digits = re.fullmatch(r"[-+]?(\d*)\.(\d+)", text)
        if digits is None or len((digits[1] + digits[2]).lstrip("0")) < 4:
            continue
        if abs(value - exact) <= Fraction(1, 2 * 10 ** len(digits[2])):
            return True
    return False


def _as_clock(answer: str) -> tuple[int, int, int, str] | None:
    """Hour, minute, second and "a", "p" or "" of a time of day; None if it is none."""
    text = re.sub(
        r"\\(?:text|mathrm)\s*\{([^{}]*)\}|[$~]|\\[,;: ]", lambda match: f" {match[1] or ''} ", answer
    )
    match = _CLOCK.fullmatch(re.sub(r"\s+", " ", text).strip().rstrip(",;").strip())
    if match is None or not (match["minute"] or match["half"]) or int(match["hour"]) > 24:
        return None
    half = (match["half"] or "").lower()[:1]
    return int(match["hour"]), int(match["minute"] or 0), int(match["second"] or 0), half


def _same_time(one: tuple[int, int, int, str], other: tuple[int, int, int, str]) -> bool:
    """The same time on a clock; which half of the day it is may be left out."""
    if one[1:3] != other[1:3]:
        return False
    (a, *_, a_half), (b, *_, b_half) = one, other
    if bool(a_half) != bool(b_half) and max(a, b) <= 12:
        return a == b
    return _hour(a, a_half) == _hour(b, b_half)


def _hour(hour: int, half: str) -> int:
    return hour % 12 + 12 * (half == "p") if half else hour
