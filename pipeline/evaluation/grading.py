"""Is a response right? The answer is what a regular expression finds, compared as text."""

from __future__ import annotations

import re
from functools import cache


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def extract_answer(response: str, pattern: str) -> str | None:
    """The first group of the last match of ``pattern``, stripped; None if there is none."""
    matches = list(_compiled(pattern).finditer(response))
    return matches[-1].group(1).strip() if matches else None


def is_correct(response: str, expected: str | None, pattern: str) -> bool:
    """Whether the extracted answer equals the expected one."""
    answer = extract_answer(response, pattern)
    return answer is not None and expected is not None and answer == expected.strip()
