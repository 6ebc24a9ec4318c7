"""A configuration for one's own models: what it says and why, and that nothing is written before all is checked."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.resolve import load_config, parse_config
from tropd.pipeline.config.schema import Config, to_plain
from tropd.pipeline.experiments.starting import draft as drafting
from tropd.pipeline.experiments.starting.draft import Request, draft_run
from tropd.pipeline.experiments.starting.start import start_run
from tropd.pipeline.models.loading import load_tokenizer
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.training.time_plan import Rates
from tropd.storage.errors import ConfigError, DataError, TropdError
from tropd.storage.stage.fingerprint import flatten
from tropd.storage.workspace import Workspace


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(count: int, **names: str) -> list[dict[str, Any]]:
    prompt, answer = names.get("prompt", "prompt"), names.get("answer", "answer")
    return [{prompt: f"{n % 10}+{n // 10}=", answer: str(n % 10 + n // 10)} for n in range(count)]


@pytest.fixture
def request_(tmp_path: Path, tiny_models: Path) -> Request:
    models = str(tiny_models)
    prompts = write(tmp_path / "prompts.jsonl", sums(60))
    return Request(Workspace(tmp_path / "run"), models, models, prompts, measures=False)


def test_only_what_differs_is_written_with_a_reason_each(request_: Request) -> None:
    start_run(request_, SILENT)
    text = request_.workspace.config_path.read_text()
    lines = [line for line in text.splitlines()[1:] if line and not line.startswith("[")]
    assert lines
    assert all(re.fullmatch(r"\w+ = \S.*  # \S.*", line) for line in lines)
    assert len(text.splitlines()) < 40
    resolved = load_config(request_.workspace.config_path)
    default = flatten("", to_plain(parse_config('[objective]\nname = "tropd"').config))
    written = flatten("", to_plain(resolved.config))
    differing = {path for path in written if written[path] != default.get(path)}
    assert differing <= set(resolved.origins.sources)
    given = {path for path in resolved.origins.sources if not path.startswith("objective.")}
    assert given == differing, "a default is not written"
    assert not any(path.startswith(("demo.", "run.", "prefixes.", "scores.")) for path in given)


def test_held_out_prompts_are_written_and_told(request_: Request) -> None:
    draft = start_run(request_, SILENT)
    root = request_.workspace.root
    trained, held = (
        [json.loads(line)["prompt"] for line in (root / "data" / name).read_text().splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert (len(trained), len(held)) == (45, 15)
    assert not set(trained) & set(held)
    assert "15 of 60 prompts" in draft.notes[0]
    config = load_config(request_.workspace.config_path).config
    assert (config.data.prompts, config.data.evaluation) == ("data/train.jsonl", "data/eval.jsonl")


def test_files_of_ones_own_stay_where_they_are(request_: Request, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "eval.jsonl", sums(7))
    start_run(replace(request_, evaluation=evaluation, objective="opd"), SILENT)
    config = load_config(request_.workspace.config_path).config
    assert (config.data.prompts, config.data.evaluation) == (str(request_.prompts), str(evaluation))
    assert config.objective.name == "opd"
    assert not (request_.workspace.root / "data").exists()


def test_fields_and_graders_follow_the_data(request_: Request, tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", [{**r, "answer": "A"} for r in sums(20, prompt="question")])
    config = parse_config(draft_run(replace(request_, prompts=path), SILENT).text()).config
    assert (config.data.prompt_field, config.evaluation.grader) == ("question", "choice")
    words = "nobody would say this in the same words again ever"
    path = write(tmp_path / "texts.jsonl", [{**r, "answer": words} for r in sums(20)])
    draft = draft_run(replace(request_, prompts=path), SILENT)
    assert parse_config(draft.text()).config.data.answer_field == ""
    assert any("distance alone" in note for note in draft.notes)


def test_what_is_given_wins(request_: Request) -> None:
    given = ("rollout.max_tokens=9", "train.learning_rate=1e-4", "train.betas=[0.8, 0.9]", "train.steps=200")
    config = parse_config(draft_run(replace(request_, assignments=given), SILENT).text()).config
    assert (config.rollout.max_tokens, config.train.learning_rate) == (9, 1e-4)
    assert (config.train.betas, config.train.steps) == ((0.8, 0.9), 200)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        draft_run(replace(request_, assignments=("train.stepz=1",)), SILENT)


def test_lengths_come_from_reference_answers_or_the_teacher(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse_config(draft_run(request_, SILENT).text()).config.rollout.max_tokens == 36  # context 40
    monkeypatch.setattr(drafting, "response_room", lambda *_: 1000)
    rates = Rates(10, 10, 10, 10, (20, 31), stopped=True, teacher_loading=1, student_loading=1)
    monkeypatch.setattr(drafting, "measure_rates", lambda *_: rates)
    measured = replace(request_, measures=True)
    draft = draft_run(measured, SILENT)
    assert parse_config(draft.text()).config.rollout.max_tokens == 64
    assert any(
        note.startswith("time, estimated from a measurement: generate-prefixes ") for note in draft.notes
    )
    worked = [{**r, "answer": "1+1=2 " * 10 + f"#### {n}"} for n, r in enumerate(sums(20))]
    draft = draft_run(replace(measured, prompts=write(tmp_path / "worked.jsonl", worked)), SILENT)
    config = parse_config(draft.text()).config
    assert (config.rollout.max_tokens > 64, config.evaluation.grader) == (True, "math")


def test_a_run_is_made_to_fit_into_memory(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "free_memory", lambda _: 1.0)
    draft = draft_run(request_, SILENT)
    config = parse_config(draft.text()).config
    assert config.train.gradient_checkpointing
    assert config.student.lora is not None
    assert config.train.learning_rate == pytest.approx(3e-3)
    assert any("it will hardly fit" in note for note in draft.notes)


def test_chat_follows_the_tokenizer(request_: Request, tmp_path: Path) -> None:
    folder = shutil.copytree(request_.teacher, tmp_path / "chat")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    chat = replace(request_, teacher=str(folder), student=str(folder))
    assert parse_config(draft_run(chat, SILENT).text()).config.data.chat
    with pytest.raises(DataError, match="has no chat template") as caught:
        draft_run(replace(chat, student=request_.student), SILENT)
    assert "student.chat_template_file" in str(caught.value.hint)
    plain = replace(chat, student=request_.student, assignments=("data.chat=false",))
    assert not parse_config(draft_run(plain, SILENT).text()).config.data.chat


def refusals(request: Request, tmp_path: Path) -> list[tuple[Request, str]]:
    turns = [{"messages": [{"role": "user", "content": "1+1="}]}] * 3
    other = write(tmp_path / "other.jsonl", sums(5, prompt="question"))
    long = write(tmp_path / "long.jsonl", [{"prompt": "1+" * 30 + "1="}, {"prompt": "1+1="}])
    torn = shutil.copytree(request.student, tmp_path / "torn", dirs_exist_ok=True) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    return [
        (replace(request, teacher="/nowhere"), "/nowhere does not exist"),
        (replace(request, student=str(torn.parent)), "cannot be read"),
        (replace(request, prompts=tmp_path / "none.jsonl"), "does not exist"),
        (replace(request, objective="magic"), "unknown objective 'magic'"),
        (replace(request, evaluation=other), "rename it in one of the files"),
        (replace(request, prompts=write(tmp_path / "m.jsonl", turns)), "only a chat template can write"),
        (replace(request, prompts=long), "there is room for"),
        (replace(request, prompts=write(tmp_path / "one.jsonl", sums(1))), "has one prompt only"),
    ]


def test_nothing_is_written_where_something_is_wrong(request_: Request, tmp_path: Path) -> None:
    for wrong, message in refusals(request_, tmp_path):
        with pytest.raises((ConfigError, DataError)) as caught:
            start_run(wrong, SILENT)
        assert message in f"{caught.value} {caught.value.hint}"
        assert not request_.workspace.root.exists()


def test_a_workspace_is_made_once(request_: Request) -> None:
    start_run(request_, SILENT)
    before = request_.workspace.config_path.read_text()
    with pytest.raises(TropdError, match="exists already"):
        start_run(request_, SILENT)
    assert request_.workspace.config_path.read_text() == before


def test_a_larger_student_learns_with_a_smaller_rate() -> None:
    sizes = [rate for _, rate in drafting.LEARNING_RATES]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == Config(objective=parse_config("").config.objective).train.learning_rate


def test_rewards_that_are_compared_get_several_responses(request_: Request) -> None:
    config = parse_config(draft_run(replace(request_, objective="grpo"), SILENT).text()).config
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (4, 4)
    config = parse_config(draft_run(request_, SILENT).text()).config
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (16, 1)


def test_bad_records_are_named_or_left_out_as_asked(request_: Request, tmp_path: Path) -> None:
    records = [*sums(30), {"promt": "1+1="}, {"prompt": ""}]
    path = write(tmp_path / "some-bad.jsonl", records)
    bad = replace(request_, prompts=path)
    with pytest.raises(
        DataError, match=r"(?s)line 31: no field 'prompt'.*line 32: field 'prompt' is empty"
    ) as caught:
        draft_run(bad, SILENT)
    assert "--skip-bad (data.skip_bad = true)" in (caught.value.hint or "")
    draft = draft_run(replace(bad, assignments=("data.skip_bad=true",)), SILENT)
    assert f"data: bad records of {path} that are left out: 2" in draft.notes
    kept = [json.loads(line)["id"] for name in draft.files for line in draft.files[name].splitlines()]
    assert sorted(kept, key=int) == [str(number) for number in range(1, 31)]
    assert parse_config(draft.text()).config.data.skip_bad


def test_a_part_of_the_prompt_in_another_field_is_told(request_: Request, tmp_path: Path) -> None:
    records = [{"instruction": f"Translate {n}.", "input": "le mot" if n % 3 else ""} for n in range(20)]
    draft = draft_run(replace(request_, prompts=write(tmp_path / "alpaca.jsonl", records)), SILENT)
    assert (
        "prompts are taken from 'instruction' (also there: input): --prompt-field names another"
        in draft.notes
    )


def test_few_prompts_are_seen_often_and_runs_have_checkpoints(request_: Request, tmp_path: Path) -> None:
    draft = draft_run(replace(request_, prompts=write(tmp_path / "few.jsonl", sums(8))), SILENT)
    config = parse_config(draft.text()).config
    assert (config.train.steps, config.train.checkpoint_every) == (20, 2)
    assert "few prompts: 20 passes over them" in draft.text()
    given = replace(request_, assignments=("train.steps=3",))
    assert parse_config(draft_run(given, SILENT).text()).config.train.checkpoint_every == 1


def test_problems_that_are_trained_on_are_told(request_: Request, tmp_path: Path) -> None:
    own = write(tmp_path / "same.jsonl", [*sums(5), {"prompt": "another", "answer": "1"}])
    notes = draft_run(replace(request_, evaluation=own), SILENT).notes
    assert "data: 5 of 6 problems are also trained on; see tropd contamination" in notes
    others = write(tmp_path / "others.jsonl", [{"prompt": "another", "answer": "1"}])
    notes = draft_run(replace(request_, evaluation=others), SILENT).notes
    assert not any("also trained on" in note for note in notes)
