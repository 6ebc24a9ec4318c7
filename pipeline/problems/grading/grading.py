"""Four graders of responses; ``EvaluationConfig.grader`` says what each takes as the answer.

Symbolic mathematics of a model's text may take forever or all memory, so it is compared in worker processes, with
a time limit per answer after which the worker is killed: such an answer is wrong.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import re
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as GradingTimeout
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from tropd.pipeline.config.sections.evaluation_settings import EvaluationConfig
from tropd.pipeline.config.sections.value_types import GraderName
from tropd.pipeline.problems.grading.choices import expected_choice, extract_choice
from tropd.pipeline.problems.grading.math_answers import (
    comparisons,
    equal_at_once,
    expected_answer,
    extract_final_answer,
)
from tropd.storage.errors import DataError

if TYPE_CHECKING:  # the workers have no use for Parquet
    from tropd.pipeline.problems.prompts import Prompt

RULES = 2
"""Number of the rules: higher by one with every change that gives a response another mark."""
WORKERS = 2
WORKER_MEMORY_BYTES = 4 << 30
# A worker is replaced after this many answers: sympy's caches grow.
WORKER_ANSWERS = 2000


@dataclass(frozen=True)
class Mark:
    """A response's answer, as it was found, and whether it is right."""

    answer: str | None
    correct: bool


def grade(
    responses: Sequence[str],
    expected: Sequence[str | None],
    config: EvaluationConfig,
    *,
    cut_off: Sequence[bool] | None = None,
) -> list[Mark]:
    """Marks of responses, in their order. A response without an answer, or without an expected one, is wrong.

    Args:
        cut_off: which responses ended because of their length; none if not given. Text that reaches the end of such a
            response may be a part of an answer, and is none.
    """
    ends = cut_off or [False] * len(responses)
    found = [
        extract(config.grader, text, config.answer_pattern, cut_off=cut)
        for text, cut in zip(responses, ends, strict=True)
    ]
    if config.grader == "math":
        correct = _equal_math(found, expected, config.grading_seconds)
    else:
        correct = [
            answer is not None and wanted is not None and answer == _plain(config.grader, wanted)
            for answer, wanted in zip(found, expected, strict=True)
        ]
    return [Mark(answer, right) for answer, right in zip(found, correct, strict=True)]


def check_expected(grader: GraderName, problems: Sequence[Prompt]) -> None:
    """Refuse expected answers that no response could ever equal.

    Raises:
        DataError: naming the problem.
    """
    for problem in problems:
        if grader == "choice" and problem.answer is not None and expected_choice(problem.answer) is None:
            raise DataError(
                f"problem {problem.id!r}: its answer {problem.answer[:80]!r} is not a choice: a letter A to J, or an "
                "index that counts from 0",
                hint='set data.answer_field to the field that has the letter, or evaluation.grader to "exact" or "math"',
            )


def extract(grader: GraderName, response: str, pattern: str, *, cut_off: bool = False) -> str | None:
    """The answer in a response, by the grader's rule; None without one."""
    extractors: dict[GraderName, Callable[[str], str | None]] = {
        "pattern": lambda text: _last_match(pattern, text, cut_off),
        "math": lambda text: extract_final_answer(text, cut_off=cut_off),
        "choice": lambda text: extract_choice(text, cut_off=cut_off),
        "exact": lambda text: None if cut_off else text.strip(),
    }
    return extractors[grader](response)


def _plain(grader: GraderName, expected: str) -> str | None:
    return expected_choice(expected) if grader == "choice" else expected.strip()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _last_match(pattern: str, response: str, cut_off: bool) -> str | None:
    matches = list(_compiled(pattern).finditer(response))
    if not matches or (cut_off and matches[-1].end(1) >= len(response.rstrip())):
        return None
    return (matches[-1].group(1) or "").strip()


def _equal_math(found: Sequence[str | None], expected: Sequence[str | None], seconds: float) -> list[bool]:
    waiting: dict[int, Any] = {}
    results = [False] * len(found)
    for i, (answer, wanted) in enumerate(zip(found, expected, strict=True)):
        if not answer or wanted is None:
            continue
        plain = expected_answer(wanted)
        at_once = equal_at_once(answer, plain)
        if at_once is None:
            waiting[i] = _pool().schedule(
                _symbolically_equal, args=(comparisons(answer, plain),), timeout=seconds
            )
        else:
            results[i] = at_once
    for i, future in waiting.items():
        try:
            results[i] = future.result()
        except (GradingTimeout, ProcessExpired, Exception):
            results[i] = False  # neither readable nor comparable in time: not the answer that was asked for
    return results


def _symbolically_equal(pairs: list[tuple[str, str]]) -> bool:
    from tropd.pipeline.problems.grading.symbolic import symbolically_equal  # sympy: in the workers only

    return symbolically_equal(pairs)


@cache
def _pool() -> ProcessPool:
    """Workers start when they are first needed, as fresh processes: no thread, no GPU and no lock is inherited."""
    pool = ProcessPool(
        max_workers=WORKERS,
        max_tasks=WORKER_ANSWERS,
        initializer=_start_worker,
        context=multiprocessing.get_context("spawn"),
    )
    atexit.register(_stop, pool)
    return pool


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _start_worker() -> None:
    # It says 'Timeout is disabled' with every answer; the limit of time is ours.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
