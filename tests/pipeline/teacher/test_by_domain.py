"""Prompts of a domain with a teacher of its own are generated, scored and judged by that teacher, and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import make_models, make_run

from tropd.pipeline.config.sections.model_settings import DomainTeacher
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.run.run import Run, as_scorer
from tropd.pipeline.stages.prefixes import fingerprint, generate_prefixes, generate_rollouts, teacher_source
from tropd.pipeline.stages.scores import fingerprint as scores_fingerprint
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.teacher import by_domain
from tropd.pipeline.teacher.by_domain import GENERAL, EngineSlot, grouped, teachers_in_use, with_only
from tropd.storage.cache.shard import read_topk
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.formats.trajectories import read_trajectories
from tropd.storage.stage.manifest import read_manifest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_models(folder / "general"), make_models(folder / "code", seed=1)


def domain_of(number: int) -> str:
    return "code" if number % 3 == 0 else "math"


def two_teachers(folder: Path, models: tuple[Path, Path], extra: str = "") -> Run:
    """Ten prompts, of which every third is of the domain ``code``."""
    own = f"[[teacher.by_domain]]\ndomain = 'code'\nmodel = '{models[1]}'\ndtype = 'float32'\n"
    run = make_run(folder, models[0], extra=own + extra)
    path = run.workspace.root / "data" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    marked = [{**r, "domain": domain_of(n)} for n, r in enumerate(records)]
    path.write_text("".join(json.dumps(r) + "\n" for r in marked))
    return run


def trajectories(run: Run, stage: str = "prefixes") -> dict[tuple[str, int], Any]:
    rows = [
        row
        for path in sorted(run.workspace.stage(stage).glob("*.parquet"))
        for row in read_trajectories(path)
    ]
    return {(row.prompt_id, row.sample_index): (row.tokens, row.sampled_logprobs) for row in rows}


def scores(run: Run) -> dict[tuple[str, int], np.ndarray[Any, Any]]:
    found = {}
    for path in sorted(run.workspace.stage("scores").glob("*.parquet")):
        table = pq.read_table(path).to_pydict()
        data = read_topk(path.with_suffix(".zarr"))
        assert data.num_tokens == sum(map(len, table["sampled_logprobs"]))
        for key in zip(*table.values(), strict=True):
            found[key[0], key[1]] = np.array(key[2], dtype=np.float32)
    return found


def test_every_domain_has_what_its_teacher_alone_would_have_made(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    both = two_teachers(tmp_path / "both", models)
    alone = [make_run(tmp_path / m.name, m) for m in models]
    for run in (both, *alone):
        generate_prefixes(run)
        score_teacher(run)
    made, scored = trajectories(both), scores(both)
    apart = [(trajectories(run), scores(run)) for run in alone]
    assert len(made) == 20
    assert apart[0][0] != apart[1][0]
    for key in made:
        of_own, own_scores = apart[domain_of(int(key[0][1:])) == "code"]
        assert made[key][0] == of_own[key][0]
        np.testing.assert_allclose(made[key][1], of_own[key][1], atol=1e-5)
        np.testing.assert_allclose(scored[key], own_scores[key], atol=1e-5)


def test_a_shard_has_one_teacher_also_of_rollouts(tmp_path: Path, models: tuple[Path, Path]) -> None:
    run = two_teachers(tmp_path / "run", models)
    generate_prefixes(run)
    generate_rollouts(run)
    for stage in ("prefixes", "rollouts"):
        for path in run.workspace.stage(stage).glob("*.parquet"):
            assert len({domain_of(int(row.prompt_id[1:])) for row in read_trajectories(path)}) == 1
    score_teacher(run, source_stage="rollouts")


def test_fingerprints_name_every_teacher(tmp_path: Path, models: tuple[Path, Path]) -> None:
    run = two_teachers(tmp_path / "run", models)
    nothing = Encoded([], [], [])
    fields = fingerprint(run, teacher_source(run), nothing).fields
    assert fields["teacher.weights"] != fields["teacher.code.weights"]
    assert fields["data.domain_field"] == "domain"
    plain = make_run(tmp_path / "plain", models[0])
    others = fingerprint(plain, teacher_source(plain), nothing).fields
    assert not any("domain" in name or "code" in name for name in others)


def test_trajectories_of_mixed_shards_are_not_scored_by_one_teacher(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    run = two_teachers(tmp_path / "run", models)
    generate_prefixes(with_only(run, GENERAL))
    with pytest.raises(TropdError, match="prompts of several teachers") as caught:
        score_teacher(run)
    assert "generate-prefixes" in str(caught.value.hint)


def test_teachers_are_those_that_prompts_name(tmp_path: Path, models: tuple[Path, Path]) -> None:
    run = two_teachers(tmp_path / "run", models)
    assert teachers_in_use(run) == ["", "code"]
    assert with_only(run, "code").config.teacher.model == str(models[1])
    assert with_only(run, "code").config.teacher.by_domain == ()
    with pytest.raises(ConfigError, match="no teacher of domain 'law'"):
        with_only(run, "law")
    prompts = [Prompt(str(n), "x", None, domain=domain_of(n)) for n in range(7)]
    assert grouped(run, prompts) == [("", [1, 2, 4, 5]), ("code", [0, 3, 6])]
    config = run.config
    strange = DomainTeacher(domain="law", model=str(models[1]))
    teacher = config.teacher.model_copy(update={"by_domain": (strange,)})
    resolved = replace(run.resolved, config=config.model_copy(update={"teacher": teacher}))
    with pytest.raises(ConfigError, match="'law', which no training prompt has"):
        teachers_in_use(replace(run, resolved=resolved))


def test_a_teacher_may_score_in_another_engine_than_it_writes_in(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", models[0])
    plain = scores_fingerprint(run, generate_prefixes(run)).fields
    opened: list[str] = []

    def open_engine(run: Run, role: str, **options: int) -> Any:
        opened.append(getattr(run.config, role).engine)
        return object(), None

    def with_engines(engine: str, scoring_engine: str | None) -> Run:
        teacher = run.config.teacher.model_copy(update={"engine": engine, "scoring_engine": scoring_engine})
        config = run.config.model_copy(update={"teacher": teacher})
        return replace(run, resolved=replace(run.resolved, config=config))

    monkeypatch.setattr(by_domain, "open_engine", open_engine)
    both = with_engines("vllm", "transformers")
    slot = EngineSlot(both, "teacher")
    assert slot.open(GENERAL, to_score=True) is slot.open(GENERAL, to_score=True)
    slot.open(GENERAL)
    assert opened == ["transformers", "vllm"]
    assert as_scorer(both).config.teacher.engine == "transformers"
    source = read_manifest(run.workspace.stage("prefixes"))
    assert source is not None
    # Scores know the engine that scored; those of a teacher with one engine have what they always had.
    assert scores_fingerprint(both, source).fields == plain
    assert scores_fingerprint(with_engines("vllm", None), source).fields == {
        **plain,
        "teacher.engine": "vllm",
    }


def test_one_engine_is_open_at_a_time(tmp_path: Path, models: tuple[Path, Path]) -> None:
    slot = EngineSlot(two_teachers(tmp_path / "run", models), "teacher")
    first = slot.open("code")
    assert slot.open("code") is first
    assert slot.open(GENERAL) is not first
