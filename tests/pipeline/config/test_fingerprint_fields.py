"""Which fields decide a result: what the marks say is what the stages record, and no recipe's fingerprint has moved.

A digest in ``RECORDED`` changes only if the stage's output changes too: every workspace made before is refused then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import make_models

from tropd.pipeline.config.recipe_files import load_objective, recipe_names, recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.experiments.demo import prepare
from tropd.pipeline.objectives.spec import FieldMark, Spec, field_marks
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.run.identity import section_fields
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages import prefixes, scores
from tropd.pipeline.stages.evaluation import evaluate
from tropd.pipeline.training import train_stage
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import Manifest, write_manifest
from tropd.storage.workspace import EVALUATED, Workspace

ENDS = (".weights", ".tokenizer", ".stop_ids", ".vocab_size", "distance_teacher", " as token ids")
"""Of names of fields whose values belong to the models of this test, or to the libraries that made them."""
NO_PROMPTS = Encoded([], [], [])
UPSTREAM = ("prefixes", "scores", "rollouts", "rollout-scores")
ODD = """
[run]
seed = 3
[data]
decontaminate = 13
domain_field = "kind"
template = "Q: {prompt}"
skip_bad = true
[prefixes]
keep = "correct"
max_tokens = 11
limit = 2
[rollout]
max_tokens = 20
temperature = 0.7
stop_ids = [1, 2]
[objective]
name = "tropd-cached"
rollouts = "stored"
schedule = { kind = "none" }
guidance = { loss = { estimator = "zero" } }
[train]
dropout = true
importance_clip = 3.0
[student]
lora = { rank = 4 }
[evaluation]
grader = "math"
distance_prompts = 0
samples = 4
pass_at = [2]
benchmarks = [{ name = "own", problems = "data/eval.jsonl", samples = 8, limit = 1 }]
harness = [{ name = "quick", task = "mmlu", limit = 5, generation = { do_sample = true } }]
[[teacher.by_domain]]
domain = "hard"
model = "elsewhere"
"""

RECORDED = {
    "odd": {
        "models": "d245eb0e436ce9ef",
        "prefixes": "728ff733bbffd2d0",
        "rollouts": "46d8593504da95b4",
        "scores": "4ef648dbe80bc9d1",
        "train": "d285c4a450adb873",
        "eval": "7da2fffd102d4d14",
    },
    "demo": {
        "models": "927699a84ff271e0",
        "prefixes": "576a3c501b30551b",
        "rollouts": "d2e5d8a6951de306",
        "scores": "c8f947ba62a85993",
        "train": "090f8df965524d18",
        "eval": "f5a6afbd92f18fe5",
    },
    "demo-llm": {
        "models": "ff24ebd5365de50a",
        "prefixes": "31f01facc3aa7090",
        "rollouts": "b45cc236ff13e233",
        "scores": "5155cd0d46d340ef",
        "train": "d15c6188bc8605a5",
        "eval": "93496b75ac9b5417",
    },
    "demo-mismatch": {
        "models": "dca761f7b3a11963",
        "prefixes": "576a3c501b30551b",
        "rollouts": "d2e5d8a6951de306",
        "scores": "c8f947ba62a85993",
        "train": "3515de8b27360671",
        "eval": "f5a6afbd92f18fe5",
    },
    "demo-scarce": {
        "models": "927699a84ff271e0",
        "prefixes": "55898ada4b2e4f15",
        "rollouts": "9dff3b38060ca459",
        "scores": "c8f947ba62a85993",
        "train": "d4f94b223ef33acb",
        "eval": "ef19adc6f72ac1f1",
    },
    "qwen3-sft-1.7b": {
        "models": "927699a84ff271e0",
        "prefixes": "8b016cc7fb2fed91",
        "rollouts": "41d6b1d7b543511a",
        "scores": "5155cd0d46d340ef",
        "train": "9ada5e9d1c199738",
        "eval": "8f306f250f9681ca",
    },
    "r1-distill-1.5b-math": {
        "models": "927699a84ff271e0",
        "prefixes": "8b016cc7fb2fed91",
        "rollouts": "41d6b1d7b543511a",
        "scores": "5155cd0d46d340ef",
        "train": "9ada5e9d1c199738",
        "eval": "8f306f250f9681ca",
    },
    "r1-distill-1.5b-multi": {
        "models": "927699a84ff271e0",
        "prefixes": "8b016cc7fb2fed91",
        "rollouts": "41d6b1d7b543511a",
        "scores": "5155cd0d46d340ef",
        "train": "9ada5e9d1c199738",
        "eval": "8f306f250f9681ca",
    },
    "rehearsal": {
        "models": "24509e269757d529",
        "prefixes": "576a3c501b30551b",
        "rollouts": "d2e5d8a6951de306",
        "scores": "1954c8c55c368288",
        "train": "3a64270fd110ad62",
        "eval": "39fe37eeb62db2a7",
    },
}
"""Recipe (and ``ODD``, in which little is as usual) → stage → digest of its fields, in their order."""
MARKED = {
    "config": (("runtime", "service"), ("run", "teacher", "student", "vllm", "reward", "sft")),
    "data": (
        ("skip_bad",),
        (
            "prompts",
            "evaluation",
            "domain_field",
            "sources",
            "decontaminate",
            "system",
            "template_date",
            "limit",
        ),
    ),
    "prefixes": (("batch_size",), ()),
    "scores": (("batch_tokens",), ()),
    "rollout": (("batch_size",), ("stop_ids",)),
    "objective": (("title", "source", "confidence", "formula", "own_context"), ("reward", "extrapolation")),
    "reward": (("seconds", "workers", "batch_rows"), ()),
    "train": (
        (
            "gradient_checkpointing",
            "attention",
            "region_gradients",
            "checkpoint_every",
            "keep_checkpoints",
            "wandb_project",
            "trace",
            "evaluate_every",
            "evaluate_problems",
        ),
        ("importance_clip", "micro_batch_tokens", "dropout"),
    ),
    "evaluation": (
        ("batch_size", "grading_seconds", "pass_at", "allow_code", "judging_seconds"),
        ("max_tokens", "distance_prompts", "benchmarks", "harness"),
    ),
    "demo": (
        ("enabled",),
        (
            "models",
            "train_problems",
            "eval_problems",
            "train_max_operations",
            "eval_min_operations",
            "eval_max_operations",
        ),
    ),
}
"""Section → its marked fields: INERT ones first, then those that are recorded APART. Adding a field is a decision."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("fingerprints") / "models")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.create(tmp_path_factory.mktemp("fingerprints") / "run")
    (workspace.root / "data").mkdir()
    for name in ("train", "eval", "aime24", "aime25", "amc23"):
        lines = [
            json.dumps({"id": f"p{n}", "prompt": f"{n}+{n}=", "answer": f"{2 * n}", "kind": kind})
            for n, kind in enumerate(["hard", "easy"])
        ]
        (workspace.root / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for stage in UPSTREAM:
        workspace.stage(stage).mkdir()
        manifest = Manifest.start(stage, Fingerprint({"made": stage}))
        write_manifest(workspace.stage(stage), manifest.model_copy(update={"complete": True}))
    return workspace


def opened(text: str, workspace: Workspace, models: Path, *assignments: str) -> Run:
    domains = "[[teacher.by_domain]]" in text
    here = [
        f"{role}.{field}"
        for role in ("teacher", "student")
        for field in (f'model="{models}"', 'dtype="float32"')
    ]
    if domains:
        here.append(f'teacher.by_domain=[{{domain="hard", model="{models}", dtype="float32"}}]')
    return Run(workspace, parse_config(text, [*here, *assignments]), SILENT)


def fields(run: Run) -> dict[str, Mapping[str, Scalar]]:
    """Fingerprint fields by stage, in the order in which a manifest has them."""
    source = Manifest.start("prefixes", Fingerprint({"made": "prefixes"}))
    problems = {
        (name, role): NO_PROMPTS for name in run.config.evaluation_sets for role in ("student", "teacher")
    }
    final = run.workspace.resolve(run.config.student.model)
    return {
        "models": prepare.fingerprint(run).fields,
        "prefixes": prefixes.fingerprint(run, prefixes.teacher_source(run), NO_PROMPTS).fields,
        "rollouts": prefixes.fingerprint(run, prefixes.student_source(run), NO_PROMPTS).fields,
        "scores": scores.fingerprint(run, source).fields,
        "train": train_stage.fingerprint(run, NO_PROMPTS).fields,
        "eval": evaluate.fingerprint(run, final, EVALUATED, problems).fields,
    }


def digests(run: Run) -> dict[str, str]:
    found = {}
    for stage, values in fields(run).items():
        known = [(name, "…" if name.endswith(ENDS) else value) for name, value in values.items()]
        found[stage] = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return found


@pytest.fixture(autouse=True)
def _harness_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd.pipeline.stages.evaluation.lm_eval.find_spec", lambda name: name)
    monkeypatch.setattr("tropd.pipeline.stages.evaluation.lm_eval.version", lambda name: "1.0")


@pytest.mark.parametrize("recipe", RECORDED)
def test_no_fingerprint_has_moved(workspace: Workspace, models: Path, recipe: str) -> None:
    text = ODD if recipe == "odd" else recipe_text(recipe)
    assert digests(opened(text, workspace, models)) == RECORDED[recipe]


def test_every_recipe_is_recorded() -> None:
    assert set(RECORDED) == {"odd", *recipe_names()}


def sections() -> dict[str, type[Spec]]:
    kinds = {name: info.annotation for name, info in Config.model_fields.items()}
    return {"config": Config} | {name: kind for name, kind in kinds.items() if isinstance(kind, type)}


def test_marks_are_decisions() -> None:
    found = {}
    for section, kind in sections().items():
        groups = tuple(tuple(n for n, m in field_marks(kind).items() if m is mark) for mark in FieldMark)
        if any(groups):
            found[section] = groups
    assert found == MARKED


def other(value: object) -> object:
    """Another value of the same kind; of a choice or a text, one that no code looks for."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 1)
    return value + 1 if isinstance(value, int | float) else 7 if value is None else f"{value}?"


SECTIONS = ("prefixes", "scores", "rollout", "train", "evaluation", "demo")
"""Sections that stages take whole, but for their marked fields."""


def changed(run: Run, choose: Callable[[FieldMark | None], bool]) -> tuple[set[str], set[str]]:
    """Fields that were given another value, chosen by their marks; and fingerprint fields that have another one then."""
    sections: dict[str, Spec] = {}
    chosen = set()
    for section in SECTIONS:
        old = getattr(run.config, section)
        found = field_marks(type(old))
        names = [n for n in type(old).model_fields if choose(found.get(n))]
        sections[section] = old.model_copy(update={n: other(getattr(old, n)) for n in names})
        chosen |= {f"{section}.{n}" for n in names}
    before = fields(run)
    config = run.config.model_copy(update=sections)
    after = fields(replace(run, resolved=replace(run.resolved, config=config)))
    both = [(before[stage], after[stage]) for stage in before]
    return chosen, {
        n for old, new in both for n in old.keys() | new.keys() if old.get(n, ...) != new.get(n, ...)
    }


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_settings_of_later_versions_are_recorded_where_they_are_used_only() -> None:
    plain = section_fields("objective", load_objective("tropd"))
    assert not any(name.endswith((".unit", ".alternatives", ".entry_clip")) for name in plain)
    assert plain["objective.outlier.loss.support"] == "truncated"  # as it always was
    changes = {"schedule": {"unit": "trajectory"}, "outlier": {"loss": {"entry_clip": 0.05}}}
    used = section_fields("objective", load_objective("tropd", changes))
    assert dict(used.items() - plain.items()) == {
        "objective.schedule.unit": "trajectory",
        "objective.outlier.loss.entry_clip": 0.05,
    }
    of_student = section_fields("objective", load_objective("rkl-topk-sg"))
    assert of_student["objective.alternatives"] == "student"
    assert of_student["objective.outlier.loss.support"] == "truncated"
    assert of_student["objective.outlier.loss.stop_gradient"] is True
    assert "objective.outlier.loss.support" not in section_fields("objective", load_objective("tip"))


def test_what_is_inert_changes_no_fingerprint(workspace: Workspace, models: Path) -> None:
    run = opened(recipe_text("demo"), workspace, models)
    chosen, differ = changed(run, lambda mark: mark is FieldMark.INERT)
    assert "train.checkpoint_every" in chosen
    assert differ == set()


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_what_has_no_mark_changes_a_fingerprint(workspace: Workspace, models: Path) -> None:
    run = opened(recipe_text("demo"), workspace, models)
    chosen, differ = changed(run, lambda mark: mark is None)
    assert "train.steps" in chosen
    assert chosen - differ == set()
