"""Trajectories are filtered again where only a filter has changed; whatever else changes is refused as ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.sections.evaluation_settings import EvaluationConfig
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.problems.grading.grading import Mark
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages import refilter
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import FingerprintMismatchError
from tropd.storage.formats.trajectories import read_trajectories


@pytest.fixture(autouse=True)
def parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right is a response of even length with the grader `pattern`, of odd length with others."""

    def grade(
        texts: Sequence[str], expected: Sequence[str | None], config: EvaluationConfig, **_: Any
    ) -> list[Mark]:
        return [Mark("x", (len(text) % 2 == 0) == (config.grader == "pattern")) for text in texts]

    monkeypatch.setattr(refilter, "grade", grade)


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Once called, nothing may be sampled."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled")

    return lambda: monkeypatch.setattr(TransformersEngine, "generate", forbidden)


def with_filter(run: Run, keep: str, grader: str = "math") -> Run:
    config = run.config
    changes = {
        "prefixes": config.prefixes.model_copy(update={"keep": keep}),
        "evaluation": config.evaluation.model_copy(update={"grader": grader}),
    }
    return replace(run, resolved=replace(run.resolved, config=config.model_copy(update=changes)))


def keys(folder: Path) -> list[tuple[str, int]]:
    shards = sorted(folder.glob("part-*.parquet"))
    return [(row.prompt_id, row.sample_index) for shard in shards for row in read_trajectories(shard)]


def test_every_filter_is_that_of_a_fresh_stage(tiny_run: Run, no_sampling: Any) -> None:
    """all → correct → another grader → all → correct, against stages that were sampled for it."""
    folder = tiny_run.workspace.stage("prefixes")
    steps = [
        ("all", "math"),
        ("correct", "math"),
        ("correct", "pattern"),
        ("all", "math"),
        ("correct", "math"),
    ]
    fresh: dict[tuple[str, str], tuple[str, str]] = {}
    for step in dict.fromkeys(steps):
        manifest = generate_prefixes(with_filter(tiny_run, *step), force=True)
        fresh[step] = manifest.fingerprint, content_digest(folder / "part-00001.parquet")
    assert len(set(fresh.values())) == 3
    generate_prefixes(with_filter(tiny_run, "all"), force=True)
    no_sampling()
    for step in steps[1:]:
        manifest = generate_prefixes(with_filter(tiny_run, *step))
        assert (manifest.fingerprint, content_digest(folder / "part-00001.parquet")) == fresh[step]
        assert manifest.complete
        again = generate_prefixes(with_filter(tiny_run, *step))
        assert again.shards == manifest.shards
    assert 0 < len(keys(folder)) < 20


def test_later_stages_notice(tiny_run: Run) -> None:
    generate_prefixes(tiny_run)
    score_teacher(tiny_run)
    filtered = with_filter(tiny_run, "correct")
    generate_prefixes(filtered)
    with pytest.raises(FingerprintMismatchError, match=r"upstream\.prefixes"):
        score_teacher(filtered)


def test_what_else_changes_is_refused(tiny_run: Run, no_sampling: Any) -> None:
    generate_prefixes(with_filter(tiny_run, "correct"))
    no_sampling()
    config = tiny_run.config
    warmer = config.model_copy(update={"prefixes": config.prefixes.model_copy(update={"temperature": 0.5})})
    run = replace(tiny_run, resolved=replace(tiny_run.resolved, config=warmer))
    with pytest.raises(FingerprintMismatchError, match=r"prefixes\.temperature"):
        generate_prefixes(with_filter(run, "all"))


def test_rejects_that_are_not_all_there_are_none(tiny_run: Run, no_sampling: Any) -> None:
    generate_prefixes(with_filter(tiny_run, "correct"))
    no_sampling()
    (rejects,) = (tiny_run.workspace.root / "rejects" / "prefixes").iterdir()
    written = sorted(rejects.iterdir())
    before = written[0].read_bytes()
    for damage in (b"", written[1].read_bytes(), None):
        written[0].unlink() if damage is None else written[0].write_bytes(damage)
        with pytest.raises(FingerprintMismatchError, match=r"prefixes\.keep: 'correct' → 'all'"):
            generate_prefixes(with_filter(tiny_run, "all"))
    written[0].write_bytes(before)
    assert len(keys(rejects)) > 0
    generate_prefixes(with_filter(tiny_run, "all"))
    assert len(keys(tiny_run.workspace.stage("prefixes"))) == 20
