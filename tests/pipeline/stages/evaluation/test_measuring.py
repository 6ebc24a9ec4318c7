"""Distances in the ``eval`` stage: of stored responses, without answers, killed and resumed, and before they existed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "teacher"))

from listening import Listening
from running import running
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run.opening import load_role
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import evenly
from tropd.pipeline.stages.evaluation import evaluate as evaluation
from tropd.pipeline.stages.evaluation import measuring
from tropd.pipeline.stages.evaluation.distance import TokenDistances
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.evaluation.held_out import NUM_PROMPTS, TEACHER
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.serve import load_service
from tropd.storage.catalog import run_query
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import FingerprintMismatchError, TropdError
from tropd.storage.formats.trajectories import read_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import read_manifest, write_manifest
from tropd.storage.stage.stage import Stage
from tropd.storage.verify.verify import verify_workspace

FEW = "[evaluation]\ndistance_prompts = 4\n"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("teacher"), seed=1)


def with_config(run: Run, old: str, new: str) -> Run:
    text = run.workspace.config_path.read_text().replace(old, new)
    run.workspace.config_path.write_text(text)
    return replace(run, resolved=parse_config(text, where="config.toml"), reporter=Listening())  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path, tiny_models: Path, teachers: Path) -> Run:
    made = make_run(tmp_path / "run", tiny_models, extra=FEW)
    return with_config(
        made,
        f"[teacher]\nmodel = {json.dumps(str(tiny_models))}",
        f"[teacher]\nmodel = {json.dumps(str(teachers))}",
    )


def said(run: Run) -> str:
    return "\n".join(run.reporter.said)  # type: ignore[attr-defined]


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def naive(model: Any, tokens: list[int], start: int, size: int) -> Any:
    with torch.no_grad():
        logits = model.double()(torch.tensor([tokens])).logits[0, start - 1 : -1, :size]
    return torch.log_softmax(logits.double(), dim=-1)


def test_distances_are_those_of_the_stored_responses(run: Run) -> None:
    summary = evaluate(run, whom=("before", "teacher")).summary
    folder = run.workspace.stage("eval")
    student, teacher = load_role(run, "student").model, load_role(run, "teacher").model
    written = {
        who: {r.prompt_id: r for r in read_trajectories(folder / f"responses-{who}.parquet")}
        for who in ("before", "teacher")
    }
    assert list(written["before"]) == list(written["teacher"]) == ["p0", "p2", "p5", "p7"]
    table = rows(folder / "distance-before.parquet")
    assert [row["prompt_id"] for row in table] == list(written["before"])
    size = load_role(run, "student").engine(batch_size=1).vocab_size
    totals = {"reverse_kl": 0.0, "forward_kl": 0.0, "acceptance": 0.0}
    for row in table:
        own, theirs = (written[who][row["prompt_id"]] for who in ("before", "teacher"))
        p, q = (
            naive(m, [*own.prompt_tokens, *own.tokens], len(own.prompt_tokens), size)
            for m in (student, teacher)
        )
        assert row["reverse_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
        assert row["acceptance"] == pytest.approx(
            float(torch.minimum(p.exp(), q.exp()).sum(-1).mean()), abs=1e-4
        )
        assert (row["student_tokens"], row["teacher_tokens"]) == (len(own.tokens), len(theirs.tokens))
        p, q = (
            naive(m, [*theirs.prompt_tokens, *theirs.tokens], len(theirs.prompt_tokens), size)
            for m in (student, teacher)
        )
        assert row["forward_kl"] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), abs=1e-4)
        assert row["teacher_entropy"] == pytest.approx(float(-(q.exp() * q).sum(-1).mean()), abs=1e-4)
        totals["reverse_kl"] += row["reverse_kl"] * len(own.tokens)
    found = summary["distance"]["before"]
    tokens = sum(row["student_tokens"] for row in table)
    assert found["reverse_kl"]["mean"] == pytest.approx(totals["reverse_kl"] / tokens)
    assert found["reverse_kl"]["low"] <= found["reverse_kl"]["mean"] <= found["reverse_kl"]["high"]
    assert found["length"]["mean"] == pytest.approx(tokens / 4)
    assert (found["method"], found["prompts"]) == ("exact", 4)
    own = summary["distance"]["teacher"]
    assert own["reverse_kl"] is own["forward_kl"] is own["acceptance"] is None
    assert own["length"]["mean"] == np.mean([len(r.tokens) for r in written["teacher"].values()])
    assert own["entropy"]["mean"] > 0


def test_first_samples_are_those_that_are_graded(run: Run) -> None:
    evaluate(run, whom=("before", "teacher"))
    folder = run.workspace.stage("eval")
    for who in ("before", "teacher"):
        graded = {
            r["prompt_id"]: r["response"]
            for r in rows(folder / f"part-{who}.parquet")
            if r["mode"] == "sampled"
        }
        responses = list(read_trajectories(folder / f"responses-{who}.parquet"))
        assert len(responses) == 4
        assert all(graded[r.prompt_id] == r.text for r in responses)


def test_what_is_graded_does_not_depend_on_the_distance(run: Run, tiny_models: Path, tmp_path: Path) -> None:
    without = make_run(tmp_path / "without", tiny_models, extra="[evaluation]\ndistance_prompts = 0\n")
    graded = []
    for one in (run, without):
        evaluate(one, whom=("before",))
        graded.append(rows(one.workspace.stage("eval") / "part-before.parquet"))
    assert graded[0] == graded[1]


def test_responses_are_of_temperature_1_whatever_is_graded(run: Run) -> None:
    evaluate(run, whom=("before",))
    plain = content_digest(run.workspace.stage("eval") / "responses-before.parquet")
    colder = with_config(run, FEW, f"{FEW}temperature = 0.5\n")
    evaluate(colder, whom=("before",), force=True)
    assert content_digest(run.workspace.stage("eval") / "responses-before.parquet") == plain


def test_problems_need_no_answer(run: Run) -> None:
    path = run.workspace.root / "data" / "eval.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    del problems[2]["answer"]
    path.write_text("".join(json.dumps(p) + "\n" for p in problems))
    summary = evaluate(run, whom=("before",)).summary
    assert "1 of 10 problems have no answer (field 'answer')" in said(run)
    assert summary["sampled"]["eval"]["before"]["problems"] == 9
    path.write_text("".join(json.dumps({"prompt": p["prompt"]}) + "\n" for p in problems))
    summary = evaluate(run, whom=("before", "teacher"), force=True).summary
    assert said(run).count("no problem has an answer") == 1
    assert summary["accuracy"]["before"] == {"greedy": None, "sampled": None}
    assert summary["sampled"] == {}
    assert summary["distance"]["before"]["prompts"] == 4
    assert not [f for f in verify_workspace(run.workspace) if f.stage == "eval"]


def test_everything_is_stored_to_be_verified_and_queried(run: Run) -> None:
    evaluate(run, whom=("before",))
    assert not [f for f in verify_workspace(run.workspace) if f.stage == "eval"]
    found = run_query(
        run.workspace, "select count(*), avg(reverse_kl) from distances where who = 'before'"
    ).rows[0]
    assert found[0] == 4
    assert found[1] > 0
    assert run_query(run.workspace, "select count(*) from evaluations").rows == [(20,)]
    path = run.workspace.stage("eval") / "distance-before.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert [f.shard for f in verify_workspace(run.workspace) if f.stage == "eval"] == [path.name]


@pytest.mark.parametrize("survived", range(3))
def test_a_killed_stage_goes_on(
    run: Run, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    original, commits = Stage.commit, []

    def commit(self: Stage, name: str, rows: int) -> None:
        if len(commits) == survived and name.startswith(("responses", "distance")):
            raise KeyboardInterrupt
        if name.startswith(("responses", "distance")):
            commits.append(name)
        original(self, name, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, whom=("before", "teacher"))
    evaluate(run, whom=("before", "teacher"))
    stopped = content_digest(run.workspace.stage("eval"))
    evaluate(run, whom=("before", "teacher"), force=True)
    assert content_digest(run.workspace.stage("eval")) == stopped


def test_what_was_evaluated_before_is_done(run: Run) -> None:
    evaluate(run, whom=("before",))
    folder = run.workspace.stage("eval")
    manifest = read_manifest(folder)
    assert manifest is not None
    fields = {k: v for k, v in manifest.fields.items() if k not in (NUM_PROMPTS, TEACHER)}
    write_manifest(
        folder, manifest.model_copy(update={"fields": fields, "fingerprint": Fingerprint(fields).digest})
    )
    before = content_digest(folder)
    evaluate(run, whom=("before",))
    assert "did not measure distances" in said(run)
    assert "done before" in said(run)
    assert content_digest(folder) == before
    # Also one that is not finished gets none, for its manifest could not tell them from others.
    for name in ("distance-before.parquet", "part-before.parquet"):
        (folder / name).unlink()
    assert "distance" not in evaluate(run, whom=("before",)).summary


def test_other_prompts_or_teachers_are_refused(run: Run, tiny_models: Path, teachers: Path) -> None:
    evaluate(run, whom=("before",))
    for old, new, field in (
        ("distance_prompts = 4", "distance_prompts = 3", NUM_PROMPTS),
        (json.dumps(str(teachers)), json.dumps(str(tiny_models)), TEACHER),
    ):
        text = run.workspace.config_path.read_text().replace(old, new)
        with pytest.raises(FingerprintMismatchError, match=field):
            evaluate(replace(run, resolved=parse_config(text, where="config.toml")), whom=("before",))


def test_without_prompts_there_is_no_distance(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "measure_distances", None)
    off = with_config(run, "distance_prompts = 4", "distance_prompts = 0")
    assert "distance" not in evaluate(off, whom=("before",)).summary


def test_a_teacher_in_another_engine_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = evaluate(run, whom=("before", "teacher")).summary["distance"]["before"]
    monkeypatch.setattr(measuring, "exact_teachers", lambda run, held_out: [])
    found = evaluate(run, whom=("before", "teacher"), force=True).summary["distance"]
    assert found["before"]["method"] == found["teacher"]["method"] == "topk"
    assert found["before"]["length"] == exact["length"]
    # K1 of four responses is a rough guess; five alternatives of these models hold most of the mass.
    assert found["before"]["reverse_kl"]["mean"] == pytest.approx(exact["reverse_kl"]["mean"], rel=0.7)
    assert 0 < found["before"]["forward_kl"]["mean"] <= exact["forward_kl"]["mean"] + 1e-4


def test_prompts_are_spread_over_the_file() -> None:
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(3, 64) == [0, 1, 2]
    assert evenly(0, 5) == evenly(5, 0) == []


def test_a_teacher_that_is_only_a_service_is_asked(run: Run, tmp_path: Path) -> None:
    exact = evaluate(run, whom=("before",)).summary["distance"]["before"]
    engine, info = load_service(run)
    with running(create_app(engine, info, run.config.service, None)) as url:
        text = run.workspace.config_path.read_text()
        place = next(line for line in text.splitlines() if line.startswith("model"))
        elsewhere = with_config(run, f"[teacher]\n{place}", f'[teacher]\nmodel = "elsewhere"\nurl = "{url}"')
        summary = evaluate(elsewhere, whom=("before", "teacher"), force=True).summary
    assert "the teacher is not evaluated" in said(elsewhere)
    found = summary["distance"]["before"]
    assert list(summary["distance"]) == list(summary["accuracy"]) == ["before"]
    assert (found["method"], found["forward_kl"]) == ("topk", None)
    assert found["length"] == exact["length"]
    assert found["reverse_kl"]["mean"] == pytest.approx(exact["reverse_kl"]["mean"], rel=0.7)
    assert found["acceptance"]["mean"] == pytest.approx(exact["acceptance"]["mean"], abs=0.2)
    assert not [f for f in verify_workspace(elsewhere.workspace) if f.stage == "eval"]


def test_what_is_no_number_is_no_distance(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = measuring.exact_distances

    def spoiled(*arguments: Any, **options: Any) -> list[TokenDistances]:
        found = exact(*arguments, **options)
        return [*found[:-1], replace(found[-1], kl=np.full_like(found[-1].kl, np.nan))]

    monkeypatch.setattr(measuring, "exact_distances", spoiled)
    with pytest.raises(
        TropdError, match="before training is not a number on the student's response to prompt 'p7'"
    ):
        evaluate(run, whom=("before",))
    assert not (run.workspace.stage("eval") / "distance-before.parquet").exists()
