"""Symbolic comparison of two mathematical expressions, by ``latex2sympy2_extended``, sympy and ``math_verify``.

The text of a model may take forever or all memory: these functions run in worker processes only (``grading``), with a
time limit. An expression is read as a whole or not at all: the parser's conversion passes over parts of the parsed tree
(the base of 101_2, a prime, a transpose), and two answers that differ there only would be equal.
"""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy import Basic, Expr, FiniteSet, Float, Interval, MatrixBase, Rational, Symbol, Tuple

DIGITS = 120
"""Digits to which two numbers without a closed difference are compared: relative 1e-100."""
MOST_ELEMENTS = 50

_CLEAN = NormalizationConfig(
    basic_latex=False, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
_GAMMAS = (
    (re.compile(r"\\gamma(?![A-Za-z])"), r"\\mathcal{gamma}"),  # the parser takes both for Euler's constant
    (re.compile(r"\\Gamma(?![A-Za-z])(?!\s*\()"), r"\\mathcal{Gamma}"),
)


def symbolically_equal(pairs: list[tuple[str, str]]) -> bool:
    """True if the two sides of one of the pairs, an answer and an expected one, are read and equal."""
    return any(_equal_texts(answer, expected) for answer, expected in pairs)


def _equal_texts(answer: str, expected: str) -> bool:
    imaginary = any(re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text) for text in (answer, expected))
    sides = [read_expression(text, real=not imaginary) for text in (answer, expected)]
    return None not in sides and _equal(*sides)


def read_expression(text: str, *, real: bool = True) -> Basic | MatrixBase | None:
    """An expression, set, interval, tuple, matrix or relation; None if any part of the text cannot be read."""
    for pattern, name in _GAMMAS:
        text = pattern.sub(name, text)
    text = normalize_latex(text, _CLEAN)
    if _lists(text):
        text = f"\\{{{text}\\}}"  # a list of values, in any order
    converter = _Latex2Sympy(is_real=real, config=ConversionConfig(lowercase_symbols=False))
    try:
        make_parser = converter.create_parser
        tree = make_parser(text).math()
        if _passed_over(tree):
            return None
        parsed = SimpleNamespace(math=lambda: tree)  # parsing takes most of the time: not twice
        converter.create_parser = lambda part: parsed if part == text else make_parser(part)
        found = converter.parse(text)
    except Exception:
        return None
    if not isinstance(found, Basic | MatrixBase):
        return None
    letter = Symbol("i", real=real)
    if found.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        return found
    return found.xreplace({sympy.I: Symbol("I", real=real), letter: sympy.I})


def _lists(text: str) -> bool:
    """True if a comma stands outside all brackets, and not all of the text is bracketed."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0 and not text.startswith(("(", "[", "\\{", "{")):
            return i > 0
    return False


def _passed_over(node: Any) -> bool:
    """True if the conversion of a parse tree would pass over a part of it, or take it for another thing."""
    kind = type(node).__name__.removesuffix("Context")
    text = node.getText()
    if kind in ("Transpose", "Degree", "Eval_at", "Dot_product", "Elementary_transforms"):
        return True
    if kind in ("Number_subexpr", "Exp", "Exp_nofunc") and node.subexpr() is not None:
        return True
    if kind in ("Mp", "Mp_nofunc") and node.COLON() is not None:
        return True
    if kind == "Postfix" and sum(op.BANG() is not None for op in node.postfix_op()) > 1:
        return True  # a double factorial, not the factorial of one
    if kind == "Func" and _function_passed_over(node):
        return True
    if (
        kind == "Unary"
        and len(node.postfix()) > 1
        and _juxtaposed([part.getText() for part in node.postfix()])
    ):
        return True
    if kind == "Atom_expr" and re.match(r"\\(?:text|mbox|mathrm|mathit|textbf|textit|textnormal)", text):
        return True  # words
    return any(
        _passed_over(child)
        for child in getattr(node, "children", None) or ()
        if hasattr(child, "getRuleIndex")
    )


def _function_passed_over(node: Any) -> bool:
    if node.func_normal_multi_arg() is not None:
        arguments = node.func_multi_arg()
        if node.subexpr() is not None or arguments is None:
            return True
        symbols = re.search(r"[A-Za-z\\]", arguments.getText())
        return symbols is not None and not node.getText().startswith(("\\max", "\\min"))
    if node.func_normal_single_arg() is not None:
        return node.subexpr() is not None and not node.getText().startswith("\\log")
    return False


def _juxtaposed(parts: list[str]) -> bool:
    """True if two numbers stand side by side that are not a mixed number: "3(4)" is read as 3 + 4."""
    number = re.compile(r"[({]*\s*(?:\d+(?:\.\d+)?|\d+/\d+|\\frac\{\d+\}\{\d+\})\s*[)}]*")
    for left, right in itertools.pairwise(parts):
        mixed = left.isdigit() and re.fullmatch(r"\\frac\{\d+\}\{\d+\}", right)
        if number.fullmatch(left) and number.fullmatch(right) and not mixed:
            return True
    return False


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, FiniteSet) != isinstance(b, FiniteSet):
        a, b = _only_element(a), _only_element(b)
    if isinstance(a, sympy.Eq) != isinstance(b, sympy.Eq):
        a, b = _assigned(a), _assigned(b)
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(_equal(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
    if isinstance(a, Tuple) and isinstance(b, Tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, FiniteSet) and isinstance(b, FiniteSet):
        return _equal_sets(list(a.args), list(b.args))
    if isinstance(a, Interval) and isinstance(b, Interval):
        same_ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return same_ends and _equal(a.start, b.start) and _equal(a.end, b.end)
    if _is_value(a) and _is_value(b):
        return _equal_values(a, b)
    return bool(
        verify(
            _exact(b),
            _exact(a),
            float_rounding=DIGITS,
            numeric_precision=DIGITS,
            allow_set_relation_comp=True,
            timeout_seconds=0,
        )
    )


def _is_value(x: Any) -> bool:
    return isinstance(x, Expr) and not isinstance(x, MatrixBase)


def _only_element(x: Any) -> Any:
    return x.args[0] if isinstance(x, FiniteSet) and len(x.args) == 1 else x


def _assigned(x: Any) -> Any:
    """The value of ``name = value``."""
    return (
        x.rhs
        if isinstance(x, sympy.Eq) and isinstance(x.lhs, Symbol | sympy.core.function.AppliedUndef)
        else x
    )


def _equal_sets(left: list[Any], right: list[Any]) -> bool:
    """True if each element has its own partner."""
    if len(left) != len(right) or len(left) > MOST_ELEMENTS:
        return False
    rest = list(right)
    for x in left:
        partner = next((i for i, y in enumerate(rest) if _equal(x, y)), None)
        if partner is None:
            return False
        rest.pop(partner)
    return True


def _exact(x: Any) -> Any:
    """Decimals as the fractions that they are."""
    if isinstance(x, MatrixBase):
        return x.applyfunc(_exact)
    return x.xreplace({number: Rational(str(number)) for number in x.atoms(Float)})


def _equal_values(a: Any, b: Any) -> bool:
    x, y = _exact(a).doit(), _exact(b).doit()
    if x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        return False
    if x == y:
        return True
    if x.has(sympy.oo, -sympy.oo) or y.has(sympy.oo, -sympy.oo):
        return False
    if x.is_number and y.is_number:
        return _equal_numbers(x, y) or _rounds_to(a, y) or _rounds_to(b, x)
    difference = sympy.expand(x - y)
    return bool(difference == 0 or sympy.simplify(difference) == 0)


def _equal_numbers(x: Any, y: Any) -> bool:
    if isinstance(x, Rational) and isinstance(y, Rational):
        return bool(x == y)
    one, other = x.evalf(DIGITS), y.evalf(DIGITS)
    gap, size = abs(one - other), max(abs(one), abs(other))
    if gap.is_comparable and size.is_comparable:
        return bool(gap <= size * Rational(1, 10 ** (DIGITS - 20)))
    return bool(sympy.simplify(x - y) == 0)


def _rounds_to(decimal: Any, value: Any) -> bool:
    """True if a decimal of four or more significant digits is a number, rounded."""
    if not isinstance(decimal, Float):
        return False
    exact = Rational(str(decimal))
    places = next((n for n in range(DIGITS) if (exact * 10**n).is_integer), DIGITS)
    if len(str(abs(exact * 10**places))) < 4 or not value.is_real:
        return False
    return bool(abs(value.evalf(DIGITS) - exact) <= Rational(1, 2 * 10**places))
