"""Left-to-right arithmetic modulo 10, with a chain of thought: small, verifiable, and easy to get wrong.

Prompt ``6+4*7-4=``, response ``6+4=0;0*7=0;0-4=6;#6``. The terse format ``0;0;6;#6`` states results only.
A problem belongs to the held-out set iff its hash says so: nothing that is trained on can meet it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tropd.storage.errors import ConfigError

OPERATIONS = "+-*"
HELD_OUT_SHARE = 8  # one problem in eight
MAX_ANSWER_SHARE = 0.11
# After this many draws without a new problem, none is left.
MOST_REJECTED = 20_000


@dataclass(frozen=True)
class Problem:
    """Digits d0 … dn and operations o1 … on, applied from the left, each result taken modulo 10."""

    digits: tuple[int, ...]
    operations: str

    @property
    def prompt(self) -> str:
        pairs = zip(self.digits[1:], self.operations, strict=True)
        return str(self.digits[0]) + "".join(f"{o}{d}" for d, o in pairs) + "="

    @property
    def held_out(self) -> bool:
        return hashlib.blake2b(self.prompt.encode(), digest_size=2).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Chain:
    """A response, and which of its characters are injected errors."""

    text: str
    injected: tuple[bool, ...]


def apply(left: int, operation: str, right: int) -> int:
    """One operation modulo 10."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return value % 10


def answer(problem: Problem) -> str:
    """The final digit."""
    value = problem.digits[0]
    for operation, digit in zip(problem.operations, problem.digits[1:], strict=True):
        value = apply(value, operation, digit)
    return str(value)


def write_chain(
    problem: Problem, *, terse: bool = False, noise: float = 0.0, generator: np.random.Generator | None = None
) -> Chain:
    """A chain of thought. With ``noise``, each intermediate result is wrong with that probability, and the chain
    continues from the wrong value."""
    value, text, injected = problem.digits[0], "", []
    for operation, digit in zip(problem.operations, problem.digits[1:], strict=True):
        result = apply(value, operation, digit)
        wrong = generator is not None and generator.random() < noise
        if wrong and generator is not None:
            result = int((result + generator.integers(1, 10)) % 10)
        step = f"{result};" if terse else f"{value}{operation}{digit}={result};"
        injected += [False] * (len(step) - 2) + [wrong, False]
        text += step
        value = result
    return Chain(f"{text}#{value}", (*injected, False, False))


def draw_problem(generator: np.random.Generator, low: int, high: int) -> Problem:
    """A problem with ``low`` to ``high`` operations, held out or not."""
    count = int(generator.integers(low, high + 1))
    digits = tuple(int(d) for d in generator.integers(0, 10, size=count + 1))
    return Problem(digits, "".join(OPERATIONS[i] for i in generator.integers(0, 3, size=count)))


def draw_training_problem(generator: np.random.Generator, low: int, high: int) -> Problem:
    """A problem that is not held out."""
    while (problem := draw_problem(generator, low, high)).held_out:
        pass
    return problem


def draw_set(seed: int, count: int, low: int, high: int, *, held_out: bool) -> list[Problem]:
    """Distinct problems in which no answer has more than MAX_ANSWER_SHARE, so that no constant answer scores well.

    Raises:
        ConfigError: fewer different problems of this size exist.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    # Ten digits must be able to fill the set, however small it is.
    limit = max(int(MAX_ANSWER_SHARE * count), -(-count // 10))
    chosen: dict[str, Problem] = {}
    answers: Counter[str] = Counter()
    rejected = 0
    while len(chosen) < count and rejected < MOST_REJECTED:
        problem = draw_problem(generator, low, high)
        digit = answer(problem)
        if problem.held_out == held_out and problem.prompt not in chosen and answers[digit] < limit:
            chosen[problem.prompt] = problem
            answers[digit] += 1
            rejected = 0
        else:
            rejected += 1
    if len(chosen) == count:
        return list(chosen.values())
    raise ConfigError(
        f"cannot draw {count} different problems with {low} to {high} operations",
        hint="ask for fewer problems, or for longer ones (section demo)",
    )
