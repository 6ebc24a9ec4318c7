"""Teachers that are told more than the student: scores, distances and training of the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from listening import Listening
from teacher_here import TeacherHere, asked_here
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.run.opening import load_role
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.teacher.wire.messages import encode_request
from tropd.pipeline.training import loop
from tropd.pipeline.training.inputs import read_inputs, student_prompts
from tropd.pipeline.training.record.checkpoint import TENSORS
from tropd.pipeline.training.record.sharded_tensors import load_tensors, stored_tensors
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.signal.ask_teacher import ask_teacher, draw_regions
from tropd.storage.errors import ConfigError, DataError, FingerprintMismatchError
from tropd.storage.formats.step_log import read_log
from tropd.storage.formats.trajectories import read_trajectories
from tropd.storage.stage.manifest import Manifest

TOLD = '{ template = "{answer}+{prompt}" }'
SELF = ('teacher.model="student"', 'objective.name="opsd"', "train.steps=3", "train.learning_rate=0.01")
SMALL = ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "train.checkpoint_every=1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def settled(run: Run, *assignments: str) -> Run:
    text = run.workspace.config_path.read_text()
    return replace(run, resolved=parse_config(text, assignments, where="config.toml"))


def told(folder: Path, models: Path, *assignments: str) -> Run:
    made = make_run(folder, models)
    return settled(made, f"teacher.context={TOLD}", *assignments)


def log_probs(model: Any, prompt: list[int], tokens: list[int], size: int) -> Any:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1, :size]
    return torch.log_softmax(logits.double(), dim=-1)


def after(run: Run, prompt_id: str) -> list[int]:
    n = int(prompt_id[1:])
    tokens: list[int] = load_role(run, "teacher").tokenizer(f"{2 * n}+{n}+{n}=")["input_ids"]
    return tokens


def losses(run: Run) -> list[float]:
    found = [record["loss"] for record in read_log(run.workspace.stage("train") / "metrics.jsonl").whole]
    assert len(found) == 3
    return found


def of_run(run: Run) -> TeacherHere:
    loaded = load_role(run, "teacher")
    return TeacherHere(TransformersEngine(loaded.model, loaded.stop_ids, num_tokens=24))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[TeacherHere]:
    """Training asks a teacher in this process."""
    opened: list[TeacherHere] = []

    def connect(run: Run, *_: Any, **__: Any) -> dict[str, TeacherHere]:
        opened.append(of_run(run))
        return {"": opened[-1]}

    asked_here(monkeypatch, connect)
    return opened


def test_cached_scores_are_those_after_the_teachers_prompt(tmp_path: Path, models: Path) -> None:
    run = told(tmp_path / "run", models)
    generate_prefixes(run)
    score_teacher(run)
    model, prompts = load_role(run, "teacher").model, {one.id: one for one in student_prompts(run).prompts}
    for path in sorted(run.workspace.stage("scores").glob("*.parquet")):
        rows = read_trajectories(run.workspace.stage("prefixes") / path.name)
        for row, scored in zip(rows, pq.read_table(path)["sampled_logprobs"].to_pylist(), strict=True):
            assert row.prompt_tokens == prompts[row.prompt_id].tokens
            naive = log_probs(model, after(run, row.prompt_id), list(row.tokens), 24)
            wanted = naive.gather(-1, torch.tensor(row.tokens).unsqueeze(-1)).squeeze(-1)
            np.testing.assert_allclose(scored, wanted, atol=1e-4)


def test_prefixes_are_written_with_or_without_it(tmp_path: Path, models: Path) -> None:
    def written(run: Run) -> tuple[Manifest, list[Any]]:
        manifest = generate_prefixes(run)
        folder = run.workspace.stage("prefixes")
        return manifest, [row for name in sorted(manifest.shards) for row in read_trajectories(folder / name)]

    plain, without = written(make_run(tmp_path / "plain", models))
    same, told_without = written(told(tmp_path / "told", models))
    assert (same.fingerprint, told_without) == (plain.fingerprint, without)
    run = told(tmp_path / "with", models, "teacher.context.prefixes=true")
    manifest, rows = written(run)
    assert manifest.fields["teacher.context.prefixes"] is True
    assert [row.prompt_tokens for row in rows] == [row.prompt_tokens for row in without]
    assert [row.tokens for row in rows] != [row.tokens for row in without]
    model = load_role(run, "teacher").model
    naive = log_probs(model, after(run, rows[0].prompt_id), list(rows[0].tokens), 24)
    wanted = naive.gather(-1, torch.tensor(rows[0].tokens).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(rows[0].sampled_logprobs, wanted, atol=1e-4)


def test_the_teacher_is_asked_about_the_same_tokens_and_requests_without_a_context_are_as_before(
    tmp_path: Path, models: Path
) -> None:
    run = told(tmp_path / "run", models)
    prompt = student_prompts(run).prompts[3]
    plan = RowPlan(0, 3, prompt.tokens, [4, 5], None, False, 7, teacher_tokens=prompt.teacher_tokens)
    row = Row(plan, [6, 7, 8], [-1.0, -2.0, -3.0], False)
    scorer, objective = of_run(run), run.config.objective
    answer = ask_teacher({"": scorer}, [row], objective, teacher_needs(objective), 24)  # type: ignore[dict-item]
    naive = log_probs(load_role(run, "teacher").model, [*after(run, "p3"), 4, 5], [6, 7, 8], 24)
    np.testing.assert_allclose(answer.teacher_logprobs, naive[range(3), [6, 7, 8]], atol=1e-4)
    # The service has drawn the same regions: alternatives are where the outliers are.
    outlier = draw_regions(objective, [row], answer).outlier
    assert answer.topk.index.tolist() == np.flatnonzero(outlier).tolist()
    bare = replace(row, plan=replace(plan, teacher_tokens=None))
    ask_teacher({"": scorer}, [bare], objective, teacher_needs(objective), 24)  # type: ignore[dict-item]
    first, second = scorer.requests
    assert second.sequences[0].tokens.tolist() == bare.sequence
    assert len(encode_request(second)) <= len(encode_request(first))


def test_distances_compare_what_the_student_reads_with_what_the_teacher_is_told(
    tmp_path: Path, models: Path
) -> None:
    run = told(tmp_path / "run", models, "evaluation.distance_prompts=3", 'teacher.model="student"')
    evaluate(run, whom=("before",))
    folder = run.workspace.stage("eval")
    model = load_role(run, "student").model
    written = {
        who: {r.prompt_id: r for r in read_trajectories(folder / f"responses-{who}.parquet")}
        for who in ("before", "teacher")
    }
    for row in pq.read_table(folder / "distance-before.parquet").to_pylist():
        name = row["prompt_id"]
        for who, kl in (("before", "reverse_kl"), ("teacher", "forward_kl")):
            response = written[who][name]
            p = log_probs(model, list(response.prompt_tokens), list(response.tokens), 24)
            q = log_probs(model, after(run, name), list(response.tokens), 24)
            p, q = (p, q) if who == "before" else (q, p)
            assert row[kl] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
            assert row[kl] > 1e-3


def test_a_student_that_is_told_nothing_more_has_nothing_to_learn(
    tmp_path: Path, models: Path, in_process: list[TeacherHere]
) -> None:
    for name in ("opsd", "pw-opsd", "caopd"):
        run = settled(
            make_run(tmp_path / name, models),
            *SELF,
            *SMALL,
            f'objective.name="{name}"',
            "train.learning_rate=1e-9",  # Adam makes whole steps of a gradient that is nothing but rounding
            'teacher.context={ template = "{prompt}" }',
        )
        loop.train(run)
        assert max(map(abs, losses(run))) < 1e-6
    assert len(in_process) == 3


def test_what_it_is_told_is_learned_and_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, models: Path, in_process: list[TeacherHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SELF, *SMALL)
    whole, halted = (told(tmp_path / name, models, *settings) for name in ("whole", "halted"))
    loop.train(whole)
    assert [
        record["loss"] > 1e-4 for record in read_log(whole.workspace.stage("train") / "metrics.jsonl").whole
    ] == [True] * 3
    original = loop.learning_rate_at

    def end(config: Any, number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return original(config, number)

    with monkeypatch.context() as broken:
        broken.setattr(loop, "learning_rate_at", end)
        with pytest.raises(KeyboardInterrupt):
            loop.train(halted)
    loop.train(halted)
    weights = [run.workspace.stage("train") / "final" / "model.safetensors" for run in (whole, halted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_context_is_refused_by_name(
    tmp_path: Path, models: Path, in_process: list[TeacherHere]
) -> None:
    run = told(tmp_path / "run", models, *SELF, *SMALL)
    loop.train(run)
    other = settled(run, 'teacher.context={ template = "1+{prompt}" }', *SELF, *SMALL)
    with pytest.raises(FingerprintMismatchError) as caught:
        loop.train(other)
    assert "teacher.context.template: '{answer}+{prompt}' → '1+{prompt}'" in str(caught.value)
    assert "data.prompts as the teacher reads them" in str(caught.value)
    with pytest.raises(FingerprintMismatchError, match=r"teacher\.context\.template"):
        loop.train(settled(run, *SELF, *SMALL))


def test_the_cache_of_another_context_is_refused(tmp_path: Path, models: Path) -> None:
    run = told(tmp_path / "run", models, 'objective.name="tropd-cached"')
    generate_prefixes(run)
    score_teacher(run)
    needs = teacher_needs(run.config.objective)
    read_inputs(run, needs, student_prompts(run))
    other = settled(run, 'teacher.context={ template = "1+{prompt}" }', 'objective.name="tropd-cached"')
    for changed in (other, settled(run, 'objective.name="tropd-cached"')):
        with pytest.raises(FingerprintMismatchError, match=r"teacher\.context\.template"):
            score_teacher(changed)
        with pytest.raises(ConfigError, match="was scored by another teacher"):
            read_inputs(changed, needs, student_prompts(changed))


def test_a_record_without_the_field_and_a_context_without_room_stop_before_any_work(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = told(tmp_path / "run", models, *SELF)
    path = run.workspace.root / "data" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[1]["answer"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr("tropd.pipeline.models.loading.load_model", None)
    for stage in (generate_prefixes, loop.train):
        with pytest.raises(
            DataError,
            match=r"line 2: no field 'answer' \(fields: id, prompt; see teacher\.context\.template\)",
        ):
            stage(run)
    long = settled(run, 'teacher.context={ template = "{prompt}' + "1" * 40 + '" }', *SELF)
    with pytest.raises(
        DataError, match="line 1: in the teacher's context, prompt 'p0' has 44 tokens, there is room for 28"
    ):
        loop.train(long)


def test_the_student_as_teacher_is_its_model_in_its_precision(tmp_path: Path, models: Path) -> None:
    run = settled(make_run(tmp_path / "run", models), 'student.model="elsewhere"', 'teacher.model="student"')
    assert (run.config.teacher.model, run.config.teacher.dtype) == ("elsewhere", "float32")


def test_a_method_for_a_told_teacher_says_so_where_none_is_told(
    tmp_path: Path, models: Path, in_process: list[TeacherHere]
) -> None:
    said = Listening()
    run = settled(make_run(tmp_path / "run", models), *SELF, *SMALL, "train.steps=1")
    loop.train(replace(run, reporter=said))
    assert any("'opsd' is meant for a teacher that is told more" in message for message in said.warnings)


FOLLOWING = (*SELF, *SMALL, "train.keep_checkpoints=9")


def stored(run: Run, step: int) -> dict[str, torch.Tensor]:
    folder = run.workspace.stage("train") / "checkpoints" / f"step-{step:06d}" / TENSORS
    tensors = {
        name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in stored_tensors(folder).items()
    }
    load_tensors(folder, tensors)
    return tensors


@pytest.mark.parametrize(("every", "decay"), [(1, 0.75), (2, 0.0)])
def test_a_teacher_follows_the_student_and_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, every: int, decay: float
) -> None:
    settings = (*FOLLOWING, f"teacher.follow={{ every = {every}, decay = {decay} }}")
    whole, halted = (told(tmp_path / name, models, *settings) for name in ("whole", "halted"))
    loop.train(whole)
    expected = dict(load_role(whole, "teacher").model.named_parameters())
    for step in (1, 2, 3):
        tensors = stored(whole, step)
        for name, before in expected.items():
            after_step = decay * before.detach() + (1 - decay) * tensors[f"model.{name}"]
            expected[name] = before if step % every else after_step
            torch.testing.assert_close(tensors[f"teacher.{name}"], expected[name].detach())
    original = loop.learning_rate_at

    def end(config: Any, number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return original(config, number)

    with monkeypatch.context() as broken:
        broken.setattr(loop, "learning_rate_at", end)
        with pytest.raises(KeyboardInterrupt):
            loop.train(halted)
    loop.train(halted)
    assert losses(halted) == losses(whole)
    weights = [run.workspace.stage("train") / "final" / "model.safetensors" for run in (whole, halted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    other = settled(whole, f"teacher.context={TOLD}", *settings, "teacher.follow.every=7")
    with pytest.raises(FingerprintMismatchError, match=rf"teacher\.follow\.every: {every} → 7"):
        loop.train(other)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('teacher.model="elsewhere"', "teacher.model as it is: set teacher.model = 'student'"),
        ('teacher.dtype="bfloat16"', "small changes round to none"),
        ("student.lora={}", "leave student.lora out"),
        ("train.max_staleness=1", "set train.max_staleness = 0"),
    ],
)
def test_what_does_not_go_with_a_teacher_that_follows_is_refused(
    tmp_path: Path, models: Path, setting: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        told(tmp_path / "run", models, *FOLLOWING, "teacher.follow={}", setting)
