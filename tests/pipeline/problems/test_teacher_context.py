"""What a teacher is told: templates over a record's fields, and nothing else in braces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.config.sections.model_settings import TeacherContext
from tropd.pipeline.problems.prompts import Prompt, scan_prompts
from tropd.pipeline.problems.teacher_context import in_context, named_fields
from tropd.storage.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "2"}
LAST = {"role": "user", "content": "And {x}?"}


def test_fields_are_names_in_braces_and_other_braces_are_text() -> None:
    context = TeacherContext(
        template=r"{prompt} \boxed{} \frac{1}{2} {answer} {meta.0.hint}", system="{answer} {who}"
    )
    assert named_fields(context) == {"answer": "system", "meta.0.hint": "template", "who": "system"}
    assert named_fields(None) == {}
    fields = {"answer": "{prompt}", "meta.0.hint": "h", "who": "w"}
    told = in_context(
        Prompt("p", "{answer}?", None, fields=fields), TeacherContext(template=context.template)
    )
    assert told.text == r"{answer}? \boxed{} \frac{1}{2} {prompt} h"


def test_a_conversation_has_the_template_around_its_last_question_and_another_system_message() -> None:
    prompt = Prompt("p", "", None, messages=(SYSTEM, USER, REPLY, LAST), fields={"answer": "4"})
    told = in_context(prompt, TeacherContext(template="{prompt} ({answer})"))
    assert list(told.turns) == [SYSTEM, USER, REPLY, {"role": "user", "content": "And {x}? (4)"}]
    told = in_context(prompt, TeacherContext(template="{prompt}", system="It is {answer}."))
    assert list(told.turns) == [{"role": "system", "content": "It is 4."}, USER, REPLY, LAST]
    told = in_context(prompt, TeacherContext(template="{prompt}", system="{prompt} {answer}."))
    assert told.turns[0]["content"] == "And {x}? 4."
    alone = in_context(
        Prompt("p", "1+1?", None, fields={"answer": "2"}),
        TeacherContext(template="{prompt}", system="{answer}"),
    )
    assert list(alone.turns) == [{"role": "system", "content": "2"}, USER]


def test_a_template_without_the_prompts_place_is_refused() -> None:
    for template in ("{answer}", "{prompt}{prompt}"):
        with pytest.raises(ValidationError, match=r"has \{prompt\} in it exactly once"):
            TeacherContext(template=template)


def test_a_record_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records = [{"hint": 4.0}, {"hint": ""}, {"hint": None}, {"other": 1}, {"hint": ["a"]}]
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}"} | record) + "\n" for n, record in enumerate(records))
    )
    prompts, rejects = scan_prompts(
        path, DataConfig(), also=lambda domain: {"hint": "teacher.context.system"}
    )
    assert [prompt.fields for prompt in prompts] == [{"hint": "4"}, {"hint": ""}]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (3, "field 'hint' is null"),
        (4, "no field 'hint' (fields: other, prompt; see teacher.context.system)"),
        (
            5,
            "field 'hint' is a list of 1 values, not text; name one of its values in teacher.context.system: hint.0",
        ),
    ]


def test_a_field_that_no_record_has_is_the_templates_mistake(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records = [
        {"prompt": "1?", "answer": "2"},
        {"prompt": "2?", "answer": None, "solution": "s", "domain": "b"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def scan(named: dict[str, str]) -> None:
        scan_prompts(path, DataConfig(domain_field="domain"), also=lambda domain: named if domain else {})

    with pytest.raises(DataError) as caught:
        scan({"solutoin": "teacher.by_domain.0.context.template"})
    assert caught.value.message == (
        f"teacher.by_domain.0.context.template names the field 'solutoin', and no record of {path} has it: did you mean "
        "'solution'? fields: answer, domain, prompt, solution"
    )
    assert "braces of teacher.by_domain.0.context.template" in (caught.value.hint or "")
    scan({"answer": "teacher.by_domain.0.context.template"})  # null, but there: the record is bad
