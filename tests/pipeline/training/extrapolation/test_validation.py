"""The problems that extrapolated weights are scored on: which, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import Listening
from tiny_runs import make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models.loading import load_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.extrapolation.validation import read_validation, validation_fields
from tropd.storage.errors import DataError

OTHER = """
[[evaluation.benchmarks]]
name = "other"
problems = "data/other.jsonl"
temperature = 0.6
"""


@pytest.fixture
def make(tmp_path: Path, tiny_models: Path) -> Any:
    def made(*assignments: str) -> tuple[Run, Listening]:
        run, said = make_run(tmp_path, tiny_models, extra=OTHER), Listening()
        records = [json.dumps({"id": f"o{n}", "prompt": f"{n}+1=", "answer": "7"}) for n in range(6)]
        (tmp_path / "data" / "other.jsonl").write_text("\n".join(records) + "\n")
        given = ["objective.name='effopd'", *assignments]
        resolved = parse_config(run.workspace.config_path.read_text(), given, where="config.toml")
        return replace(run, resolved=resolved, reporter=said), said

    return made


def test_they_are_spread_over_the_named_set_with_its_settings(make: Any, tiny_models: Path) -> None:
    run, said = make("objective.extrapolation.problems='other'", "objective.extrapolation.most=3")
    found = read_validation(run, load_tokenizer(tiny_models), 40)
    assert found is not None
    assert [one.id for one in found.problems] == ["o0", "o2", "o4"]
    assert found.settings.temperature == 0.6
    assert said.warnings == []
    fields = validation_fields(run)
    assert fields["validation.evaluation.temperature"] == 0.6
    assert fields["objective.extrapolation.most"] == 3


def test_choosing_on_the_problems_of_the_final_accuracy_is_said(make: Any, tiny_models: Path) -> None:
    run, said = make()
    found = read_validation(run, load_tokenizer(tiny_models), 40)
    assert found is not None
    assert len(found.problems) == 10
    [warning] = said.warnings
    assert "its accuracy on them flatters it: objective.extrapolation.problems" in warning


def test_problems_without_answers_are_refused_unless_the_teacher_decides(
    make: Any, tiny_models: Path
) -> None:
    for score in ("accuracy", "reverse_kl"):
        run, _ = make(f"objective.extrapolation.score='{score}'")
        path = run.workspace.root / "data" / "eval.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(6)))
        if score == "accuracy":
            with pytest.raises(DataError, match="no problem has an answer") as caught:
                read_validation(run, load_tokenizer(tiny_models), 40)
            assert "score = 'reverse_kl'" in str(caught.value.hint)
        else:
            found = read_validation(run, load_tokenizer(tiny_models), 40)
            assert found is not None
            assert len(found.prompts.prompts) == 6


def test_a_named_set_for_the_teacher_needs_no_answers_but_the_fields_of_its_context(
    make: Any, tiny_models: Path
) -> None:
    settings = (
        "objective.extrapolation={score='reverse_kl', problems='other'}",
        "evaluation.distance_prompts=0",
    )
    context = "teacher.context.template='{prompt}{hint}'"
    run, _ = make(*settings, context)
    path = run.workspace.root / "data" / "other.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1=", "hint": "7"}) + "\n" for n in range(4)))
    found = read_validation(run, load_tokenizer(tiny_models), 40)
    assert found is not None
    assert [one.prompt.fields for one in found.prompts.prompts] == [{"hint": "7"}] * 4
    path.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    with pytest.raises(DataError, match="names the field 'hint'"):
        read_validation(run, load_tokenizer(tiny_models), 40)


def test_a_limit_and_lengths_are_told_whatever_the_score(make: Any) -> None:
    run, _ = make(
        "objective.extrapolation={score='reverse_kl', problems='other'}",
        "evaluation.limit=5",
        "evaluation.max_tokens=6",
    )
    fields = validation_fields(run)
    assert (fields["validation.evaluation.limit"], fields["validation.evaluation.max_tokens"]) == (5, 6)
