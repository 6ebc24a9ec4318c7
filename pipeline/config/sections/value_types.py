"""Types of single values in a configuration, with their bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

Dtype = Literal["float32", "bfloat16"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]
EngineName = Literal["transformers", "vllm"]
GraderName = Literal["pattern", "math", "choice", "exact"]
Device = Literal["auto", "cpu", "cuda"]

# Every number has bounds: a value beyond them is a slip of the pen, and would fail late or never end.
MOST = 1_000_000_000
"""Most of anything that is counted: steps, prompts, problems."""
MOST_ALTERNATIVES = 1024
"""Most alternatives of a token."""
MOST_TOKENS = 1 << 30
"""Most tokens of a sequence, a batch or a queue."""
MOST_ROWS = 1 << 20
"""Most rows that are handled together, and most samples of one prompt."""
WEEK = 7 * 86_400.0
"""Longest time that anything waits, in seconds."""

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
Number = Annotated[float, Field(ge=-1e308, le=1e308)]


def has_a_place(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("a template has {prompt} in it exactly once")
    return template


TokenId = Annotated[int, Field(ge=0, le=MOST)]
Template = Annotated[str, AfterValidator(has_a_place)]
