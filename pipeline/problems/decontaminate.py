"""Training prompts that share a stretch of words with an evaluation problem (n-gram overlap, as in GPT-3, appendix C).

Words are runs of letters and digits, case and Unicode form apart. Texts of fewer than n words match as a whole. What is
held in memory is the evaluation's stretches; training prompts are looked at one after another.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.problems.prompts import Prompt, scan_prompts
from tropd.storage.workspace import Workspace

USUAL_WORDS = 13
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """A training prompt and the problem that it shares words with."""

    prompt: str
    """Id of the training prompt."""
    line: int
    benchmark: str
    """Name of the evaluation set; ``evaluation`` for that of ``data.evaluation``."""
    problem: str
    """Id of the problem."""
    words: str
    """The shared words."""


def stretches(text: str, n: int) -> list[str]:
    """All runs of ``n`` words, in order; the whole text where it is shorter, nothing where it has no words."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) <= n:
        return [" ".join(words)] if words else []
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def overlaps(training: Iterable[Prompt], problems: Iterable[tuple[str, Prompt]], n: int) -> list[Overlap]:
    """The training prompts that share ``n`` words with a problem, each with the first stretch that it shares."""
    index: dict[str, tuple[str, str]] = {}
    for benchmark, problem in problems:
        for stretch in stretches(problem.asked, n):
            index.setdefault(stretch, (benchmark, problem.id))
    found = []
    for prompt in training:
        shared = next((stretch for stretch in stretches(prompt.asked, n) if stretch in index), None)
        if shared is not None:
            found.append(Overlap(prompt.id, prompt.line, *index[shared], shared))
    return found


def find_overlaps(workspace: Workspace, config: Config, n: int) -> tuple[list[Overlap], int]:
    """Overlaps of ``data.prompts`` with every evaluation set, and how many training prompts were compared.

    Texts are compared as they are in the files, without the template around them.

    Raises:
        DataError: a file is missing.
    """
    problems = []
    for name, data in config.problem_files.items():
        found = scan_prompts(workspace.resolve(data.evaluation), _bare(data))[0]
        problems += [(name or "evaluation", problem) for problem in found]
    training = scan_prompts(workspace.resolve(config.data.prompts), _bare(config.data))[0]
    return overlaps(training, problems, n), len(training)


def _bare(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"template": "{prompt}"})
