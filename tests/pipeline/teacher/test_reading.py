"""Prompts as student and teacher read them: chat templates with arguments and files of their own, a role's each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_models, make_run

from tropd.pipeline.problems.encoding import tokens_of
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.training.inputs import student_prompts
from tropd.storage.errors import ConfigError, FingerprintMismatchError

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt and wide %}+{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def with_settings(run: Run, section: str, **fields: Any) -> Run:
    config = run.config
    changed = getattr(config, section).model_copy(update=fields)
    return replace(run, resolved=replace(run.resolved, config=config.model_copy(update={section: changed})))


def chatting(folder: Path, models: Path) -> Run:
    return with_settings(make_run(folder, models, prompts=4), "data", chat=True)


def test_arguments_are_a_roles_own_and_what_the_templates_write_is_compared(
    tmp_path: Path, models: Path
) -> None:
    run = chatting(tmp_path / "run", models)
    plain = tokens_of(student_prompts(run).prompts)
    wide = with_settings(run, "student", chat_template_args={"wide": True})
    with pytest.raises(
        ConfigError, match=r"read prompt 'p0' differently: token 4 is 12 '\+' for the student and the end"
    ):
        generate_prefixes(wide)
    both = with_settings(wide, "teacher", chat_template_args={"wide": True, "unused": 1})
    assert [[*tokens, 12] for tokens in plain] == tokens_of(student_prompts(both).prompts)


def test_a_changed_argument_file_or_system_message_is_named(tmp_path: Path, models: Path) -> None:
    run = chatting(tmp_path / "run", models)
    made = generate_prefixes(run)
    assert not any("chat_template" in name or name == "data.system" for name in made.fields)
    evaluate(run, whom=("before",))
    args = {"wide": True}
    wide = with_settings(
        with_settings(run, "teacher", chat_template_args=args), "student", chat_template_args=args
    )
    with pytest.raises(FingerprintMismatchError) as caught:
        generate_prefixes(wide)
    assert "student.chat_template_args: " in str(caught.value)
    with pytest.raises(FingerprintMismatchError, match=r"before\.student\.chat_template_args"):
        evaluate(wide, whom=("before",))
    (run.workspace.root / "own.jinja").write_text(TEMPLATE + "{# mine #}")
    own = with_settings(run, "student", chat_template_file="own.jinja")
    with pytest.raises(FingerprintMismatchError, match=r"student\.chat_template_file"):
        generate_prefixes(own)
    with pytest.raises(FingerprintMismatchError, match=r"data\.system: None → '1\+1=2'"):
        generate_prefixes(with_settings(run, "data", system="1+1=2"))


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path, models: Path) -> None:
    run = chatting(tmp_path / "run", models)
    file = run.workspace.root / "own.jinja"
    own = with_settings(run, "student", chat_template_file="own.jinja")
    with pytest.raises(ConfigError, match=r"student\.chat_template_file: .*own\.jinja cannot be read"):
        student_prompts(own)
    file.write_text("{{ messages[0].content }}")
    with pytest.raises(ConfigError, match=r"own\.jinja has no place for a response"):
        student_prompts(own)
    file.write_text("{% for m in messages %}9{{ m.content }}{% endfor %}")
    with pytest.raises(
        ConfigError, match="differently: token 0 is 11 '9' for the student and 2 '0' for the teacher"
    ):
        student_prompts(own)
    both = with_settings(own, "teacher", chat_template_file="own.jinja")
    assert student_prompts(both).prompts[0].tokens[0] == 11
    assert role_tokenizer(own, "student", models).chat_template == file.read_text()
