"""Sources of rewards: the grader's marks, batches of a function, and what is checked before anything is loaded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.training.inputs import Inputs
from tropd.pipeline.training.reward.function import Missing
from tropd.pipeline.training.reward.judges import open_judge, reward_fields
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.storage.errors import DataError
from tropd.storage.workspace import Workspace

END = 3


class Tokenizer:
    """One character per id."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


def run_of(folder: Path, reward: str, answers: list[str | None]) -> tuple[Any, Inputs, list[str]]:
    text = f'[rollout]\nsamples_per_prompt = 2\n[objective]\nname = "grpo"\n[evaluation]\ngrader = "exact"\n{reward}'
    told: list[str] = []
    run = SimpleNamespace(
        config=parse_config(text).config,
        workspace=Workspace.create(folder),
        reporter=SimpleNamespace(warning=told.append),
    )
    prompts = [
        EncodedPrompt(Prompt(str(n), "question", answer, line=n + 1), [9]) for n, answer in enumerate(answers)
    ]
    return run, Inputs(prompts, None, None, None, None), told


def row(index: int, text: str, *, prefix: str = "", truncated: bool = False) -> Row:
    tokens = [*map(ord, text), *([] if truncated else [END])]
    plan = RowPlan(index, index, [9], list(map(ord, prefix)), None, False, seed=0)
    return Row(plan, tokens, [-1.0] * len(tokens), truncated)


def test_the_grader_marks_whole_responses(tmp_path: Path) -> None:
    run, inputs, told = run_of(tmp_path, '[reward]\nmissing = "drop"', ["42", None])
    with ExitStack() as stack:
        judge = open_judge(run, stack, inputs, Tokenizer())
        assert judge is not None
        groups = [[row(0, "2", prefix="4"), row(0, "43"), row(0, "42", truncated=True)], [row(1, "1")]]
        missing = Missing("its prompt has no answer in field 'answer'")
        assert judge(groups) == [[1.0, 0.0, 0.0], [missing]]
        assert judge([]) == []
    assert "1 of 2 training prompts have no answer" in told[0]


def test_prompts_without_answers_are_refused(tmp_path: Path) -> None:
    run, inputs, _ = run_of(tmp_path, "", ["42", None])
    with ExitStack() as stack, pytest.raises(DataError, match=r"the first is prompt '1' \(line 2 of "):
        open_judge(run, stack, inputs, Tokenizer())


def test_a_function_gets_the_rows_of_a_prompt_together(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def calls(rows):\n"
        "    assert rows[0]['response'] == 'ab' and rows[0]['token_ids'] == [ord('b'), 3]\n"
        "    return [len(rows) + int(row['id']) / 10 for row in rows]\n"
    )
    run, inputs, _ = run_of(
        tmp_path, '[reward]\nsource = "function"\nfunction = "own:calls"\nbatch_rows = 2', [None] * 3
    )
    with ExitStack() as stack:
        judge = open_judge(run, stack, inputs, Tokenizer())
        assert judge is not None
        groups = [[row(n, "b", prefix="a")] * size for n, size in ((0, 3), (1, 1), (2, 1))]
        assert judge(groups) == [[3.0] * 3, [2.1], [2.2]]
        assert judge([]) == []


def test_the_fingerprint_knows_the_source_of_rewards(tmp_path: Path) -> None:
    run, _, _ = run_of(tmp_path, "", ["1"])
    assert set(reward_fields(run)) == {
        "reward.source",
        "reward.per",
        "reward.missing",
        "reward.correct_from",
        "evaluation.grader",
        "evaluation.grading_rules",
    }
    (tmp_path / "own.py").write_text("def f(rows): ...\n")
    run, _, _ = run_of(tmp_path, '[reward]\nsource = "function"\nfunction = "own:f"', ["1"])
    before = reward_fields(run)["reward.function_source"]
    (tmp_path / "own.py").write_text("def f(rows): return []\n")
    assert reward_fields(run)["reward.function_source"] != before
    plain = SimpleNamespace(config=parse_config('[objective]\nname = "tropd"\n').config)
    assert reward_fields(plain) == {}  # type: ignore[arg-type]
