"""Is a response right? Four graders; what each takes as the answer is said in ``EvaluationConfig.grader``.

Symbolic mathematics of what a model wrote may take for ever or all memory, so it is compared in worker processes, with
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
from typing import Any

from pebble import ProcessExpired, ProcessPool

from tropd.pipeline.config import EvaluationConfig, GraderName
from tropd.pipeline.evaluation.math_answers import (
    equal_at_once,
    expected_answer,
    extract_final_answer,
    symbolically_equal,
)

WORKERS = 2
WORKER_MEMORY_BYTES = 4 << 30
# A worker is replaced after this many answers: sympy's caches grow.
WORKER_ANSWERS = 2000

_CHOICE = (
    re.compile(r"\\boxed\{\s*(?:\\text\s*\{)?\s*\(?([A-J])\)?"),
    re.compile(r"(?i:answer|choice|option)(?:\s+(?i:is|was))?\s*:?\s*\**\s*\(?\$?(?:\\text\{)?\(?([A-J])\b"),
    re.compile(r"^\W*\(?([A-J])\)?\W*$", re.MULTILINE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?<![\w'])([B-J])(?![\w'])"),
)


@dataclass(frozen=True)
class Mark:
    """A response's answer, as it was found, and whether it is right."""

    answer: str | None
    correct: bool


def grade(responses: Sequence[str], expected: Sequence[str | None], config: EvaluationConfig) -> list[Mark]:
    """Marks of responses, in their order. A response without an answer, or without an expected one, is wrong."""
    found = [extract(config.grader, text, config.answer_pattern) for text in responses]
    if config.grader == "math":
        correct = _equal_math(found, expected, config.grading_seconds)
    else:
        correct = [
            answer is not None and wanted is not None and answer == _plain(config.grader, wanted)
            for answer, wanted in zip(found, expected, strict=True)
        ]
    return [Mark(answer, right) for answer, right in zip(found, correct, strict=True)]


def extract(grader: GraderName, response: str, pattern: str) -> str | None:
    """The answer in a response, by the grader's rule; None if there is none."""
    extractors: dict[GraderName, Callable[[str], str | None]] = {
        "pattern": lambda text: _last_match(pattern, text),
        "math": extract_final_answer,
        "choice": _extract_choice,
        "exact": lambda text: text.strip(),
    }
    return extractors[grader](response)


def _plain(grader: GraderName, expected: str) -> str:
    return expected.strip().strip("()") if grader == "choice" else expected.strip()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _last_match(pattern: str, response: str) -> str | None:
    matches = list(_compiled(pattern).finditer(response))
    return matches[-1].group(1).strip() if matches else None


def _extract_choice(response: str) -> str | None:
    """The letter that is boxed, stated ("the answer is (C)"), alone on a line, in parentheses, or else the last one."""
    text = response.rsplit("</think>", 1)[-1][-20_000:]
    for pattern in _CHOICE:
        if matches := pattern.findall(text):
            return str(matches[-1])
    return None


def _equal_math(found: Sequence[str | None], expected: Sequence[str | None], seconds: float) -> list[bool]:
    waiting: dict[int, Any] = {}
    results = [False] * len(found)
    for i, (answer, wanted) in enumerate(zip(found, expected, strict=True)):
        if not answer or wanted is None:
            continue
        plain = expected_answer(wanted)
        at_once = equal_at_once(answer, plain)
        if at_once is None:
            waiting[i] = _pool().schedule(symbolically_equal, args=(answer, plain), timeout=seconds)
        else:
            results[i] = at_once
    for i, future in waiting.items():
        try:
            results[i] = future.result()
        except (GradingTimeout, ProcessExpired, Exception):
            results[i] = False  # neither readable nor comparable in time: not the answer that was asked for
    return results


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
