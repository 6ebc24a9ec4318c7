"""Fields that are called otherwise now are refused with that name, and unknown names with those that there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from tropd.pipeline.config import problems
from tropd.pipeline.config.explain import explain
from tropd.pipeline.config.paper_tables import load_table
from tropd.pipeline.config.recipe_files import load_objective, recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.scores import score_teacher
from tropd.storage.errors import ConfigError


@pytest.mark.parametrize(
    ("table", "old"),
    [
        ("[objective.outlier.loss]\nestimator='topk_fkl'", "line 3: objective.outlier.loss.k"),
        ("[[objective.token_weights]]\nkind='soft_or_top'", "objective.token_weights.0.k"),
    ],
)
def test_a_field_of_an_earlier_version_is_refused_with_its_name_now(table: str, old: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"{table}\nk = 32\n", where="W/config.toml")
    assert f"{old}: this field of earlier versions is objective.k now" in str(caught.value)


def test_renamed_fields_are_no_fields_and_their_names_are(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = parse_config("")
    for old, new in problems.RENAMED.items():
        assert explain(resolved, new)
        with pytest.raises(ConfigError, match=f"it is {new} now"):
            explain(resolved, old)
    monkeypatch.setattr(problems, "RENAMED", {"train.max_steps": "train.steps", "sampling": "rollout"})
    with pytest.raises(
        ConfigError, match=r"--set train\.max_steps=3: train\.max_steps: .* is train\.steps now"
    ):
        parse_config("", ["train.max_steps=3"])
    with pytest.raises(ConfigError, match="sampling: this field of earlier versions is rollout now"):
        parse_config("[sampling]\ntop_p = 0.5\n")


NO_RUN = cast(Any, None)


@pytest.mark.parametrize(
    ("ask", "message", "valid"),
    [
        (lambda: recipe_text("dmo"), "unknown recipe 'dmo'", "did you mean 'demo'? one of: demo, demo-llm"),
        (lambda: load_objective("trop"), "unknown objective 'trop'", "tropd-mask"),
        (
            lambda: load_table("table9", rehearse=True),
            "unknown table 'table9'",
            "table3, table4, table5, table6",
        ),
        (lambda: score_teacher(NO_RUN, source_stage="train"), "'train'", "one of: prefixes, rollouts"),
        (
            lambda: evaluate(NO_RUN, whom=cast(Any, ["students"])),
            "unknown role 'students'",
            "one of: before, after, teacher",
        ),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(
    ask: Callable[[], object], message: str, valid: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ask()
    assert message in str(caught.value)
    assert valid in str(caught.value)


def test_a_benchmark_that_training_prompts_are_not_compared_with_is_told() -> None:
    lighteval = "{ task = 'lcb:codegeneration_v6', module = 'lcb.main' }"
    text = f"[[evaluation.benchmarks]]\nname = 'lcb'\nproblems = 'p'\nlighteval = {lighteval}\n"

    def told(*given: str) -> list[str]:
        found = parse_config(text, given)
        return problems.unusual(found.config, found.origins)

    (sentence,) = told("data.decontaminate=13")
    assert "so not with lcb: set evaluation.allow_code = true before the first stage" in sentence
    assert "(--set data.decontaminate=13)" in sentence
    assert not told("data.decontaminate=13", "evaluation.allow_code=true")
    assert not told()
