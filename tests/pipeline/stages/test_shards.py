"""A stage's output is the same bytes whoever makes its shards, and bad prompts stop it before a model is loaded."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run import opening
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages import shards
from tropd.pipeline.stages.prefixes import generate_prefixes, generate_rollouts
from tropd.pipeline.stages.scores import open_scorer, score_teacher
from tropd.pipeline.stages.shard_work import ShardSpec, Work
from tropd.pipeline.stages.shards import Execution, Part
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import (
    ConfigError,
    DamagedShardError,
    DataError,
    FingerprintMismatchError,
    StageLockedError,
    TropdError,
)
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.job_parts import part_folder, parts_folder
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.stage.stage import lock_stage
from tropd.storage.verify.verify import verify_workspace
from tropd.storage.workspace import CACHE_STAGES


def digests(run: Run) -> dict[str, str]:
    return {stage: content_digest(run.workspace.stage(stage)) for stage in ("prefixes", "scores")}


def both_stages(run: Run, *executions: Execution) -> dict[str, str]:
    for stage in (generate_prefixes, score_teacher):
        for execution in executions:
            stage(run, execution=execution)
    return digests(run)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> dict[str, str]:
    return both_stages(make_run(tmp_path_factory.mktemp("whole") / "run", tiny_models), shards.HERE)


def test_what_counts_as_a_part() -> None:
    assert Part.parse("3/8") == Part(3, 8)
    for text in ("0/8", "9/8", "3", "3/", "/3", "a/b", "-1/2", "1/0", "1/2/3"):
        with pytest.raises(ConfigError, match="i/n with 1"):
            Part.parse(text)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_give_the_bytes_of_the_whole(
    tiny_run: Run, expected: dict[str, str], order: tuple[int, ...]
) -> None:
    assert both_stages(tiny_run, *(Execution(Part(i, 3)) for i in order)) == expected
    assert not parts_folder(tiny_run.workspace.stage("scores")).exists()


def test_more_parts_than_shards_and_another_n_midway(tiny_run: Run, expected: dict[str, str]) -> None:
    generate_prefixes(tiny_run, execution=Execution(Part(1, 2)))
    assert read_manifest(tiny_run.workspace.stage("prefixes")) is None
    assert both_stages(tiny_run, *(Execution(Part(i, 7)) for i in range(1, 8))) == expected


def test_without_shards_the_stage_takes_what_parts_have_and_makes_the_rest(
    tiny_run: Run, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_prefixes(tiny_run)
    part = score_teacher(tiny_run, execution=Execution(Part(2, 3)))
    assert list(part.shards) == ["part-00001.parquet", "part-00001.zarr"]
    made: list[int] = []

    def open_and_note(source: str, run: Run) -> Any:
        make = open_scorer(source, run)

        def noting(number: int, *rest: Any) -> dict[str, int]:
            made.append(number)
            return make(number, *rest)

        return noting

    monkeypatch.setattr("tropd.pipeline.stages.scores.open_scorer", open_and_note)
    score_teacher(tiny_run)
    assert made == [0, 2]
    assert digests(tiny_run) == expected


def test_a_running_part_stops_the_gathering(tiny_run: Run) -> None:
    generate_prefixes(tiny_run, execution=Execution(Part(1, 2)))
    with lock_stage(part_folder(tiny_run.workspace.stage("prefixes"), 1, 2)):
        with pytest.raises(StageLockedError, match="part 1-of-2 of stage 'prefixes' is still being made"):
            generate_prefixes(tiny_run)
    assert generate_prefixes(tiny_run).complete


def test_a_damaged_part_is_refused_by_name(tiny_run: Run) -> None:
    generate_prefixes(tiny_run, execution=Execution(Part(1, 2)))
    shard = part_folder(tiny_run.workspace.stage("prefixes"), 1, 2) / "part-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"1-of-2/part-00002\.parquet"):
        generate_prefixes(tiny_run)


def test_parts_of_other_settings_are_not_taken(tiny_run: Run, expected: dict[str, str]) -> None:
    text = tiny_run.workspace.config_path.read_text() + "[run]\nseed = 5\n"
    generate_prefixes(
        replace(tiny_run, resolved=parse_config(text, where="x")), execution=Execution(Part(1, 2))
    )
    with pytest.raises(FingerprintMismatchError, match=r"run\.seed"):
        generate_prefixes(tiny_run, execution=Execution(Part(1, 2)))
    assert both_stages(tiny_run, shards.HERE) == expected


def test_a_part_of_a_complete_stage_has_nothing_to_do(tiny_run: Run) -> None:
    whole = generate_prefixes(tiny_run)
    assert generate_prefixes(tiny_run, execution=Execution(Part(1, 2))).shards == whole.shards
    assert not parts_folder(tiny_run.workspace.stage("prefixes")).exists()
    with pytest.raises(ConfigError, match="--force and --shards"):
        generate_prefixes(tiny_run, execution=Execution(Part(1, 2)), force=True)


# ------------------------------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    ("stage", "teacher", "expected"),
    [
        # A scorer of its own takes one GPU, however many the engine that generates is spread over.
        ("scores", {"engine": "vllm", "scoring_engine": "transformers"}, (4, 1)),
        ("scores", {"engine": "transformers", "scoring_engine": "vllm"}, (2, 2)),
        ("prefixes", {"engine": "vllm", "scoring_engine": "transformers"}, (2, 2)),
        ("rollouts", {"engine": "vllm"}, (4, 1)),
    ],
)
def test_a_part_has_the_gpus_of_the_engine_that_makes_it(
    tiny_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    teacher: dict[str, str],
    expected: tuple[int, int],
) -> None:
    text = tiny_run.workspace.config_path.read_text() + "[vllm]\ntensor_parallel_size = 2\n"
    settings = [f"teacher.{name}={value}" for name, value in teacher.items()]
    run = replace(tiny_run, resolved=parse_config(text, settings, where="x"))
    started: list[tuple[int, int]] = []

    def parts(command: Any, count: int, logs: Path, name: str, *, devices_each: int, tick: Any) -> None:
        started.append((count, devices_each))

    monkeypatch.setattr(shards, "run_parts", parts)

    def open_maker(run: Run) -> Any:
        def make(number: int, folder: Path, advance: Any) -> dict[str, int]:
            (folder / f"part-{number}").write_text("made")
            return {f"part-{number}": 1}

        return make

    work = Work("made", "shards", [ShardSpec(n, (f"part-{n}",), 1) for n in range(4)], open_maker)
    shards.run_stage(
        run, stage, Fingerprint({}), lambda: work, lambda opened: opened.finish(), execution=Execution(gpus=4)
    )
    assert started == [expected]


# ------------------------------------------------------------------------------------------- Ray


class DyingOpener:
    """Opens a scorer whose worker kills itself at its first shard, the first time (or every time)."""

    def __init__(self, marker: Path, *, always: bool = False) -> None:
        self.marker, self.always = marker, always

    def __call__(self, run: Run) -> Any:
        make = open_scorer("prefixes", run)

        def dying(*arguments: Any) -> dict[str, int]:
            if self.always or not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return make(*arguments)

        return dying


@pytest.fixture(scope="module")
def ray_cluster() -> Any:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    source = str(Path(__file__).parents[1])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": source}},
    )
    yield ray
    ray.shutdown()


@pytest.mark.slowest
def test_ray_workers_give_the_same_bytes_even_if_one_dies(
    tiny_run: Run, expected: dict[str, str], ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_prefixes(tiny_run, execution=Execution(ray_workers=2))
    monkeypatch.setattr(
        "tropd.pipeline.stages.scores.partial", lambda *_: DyingOpener(tmp_path / "died", always=False)
    )
    score_teacher(tiny_run, execution=Execution(ray_workers=2))
    assert (tmp_path / "died").exists()
    assert digests(tiny_run) == expected


def test_ray_is_asked_for_by_its_extra(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"tropd\[ray\]"):
        generate_prefixes(tiny_run, execution=Execution(ray_workers=2))


# ------------------------------------------------------------------------------- prompts and storage


def test_bad_prompts_stop_before_any_model_is_loaded(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "load_model", None)
    data = tiny_run.workspace.root / "data" / "train.jsonl"
    lines = data.read_text().splitlines()
    lines[3:3] = ['{"prompt": ', json.dumps({"prompt": "1+" * 30 + "1="}), '{"prompt": ""}', lines[0]]
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="4 bad line") as caught:
        generate_prefixes(tiny_run)
    told = str(caught.value)
    assert "line 4: not valid JSON" in told
    assert "line 5: prompt '5' has 62 tokens, there is room for 28" in told
    assert "line 6: field 'prompt' is empty" in told
    assert "line 7: id 'p0' is also on line 1" in told


def test_skip_bad_leaves_them_out_and_lists_them(tiny_run: Run) -> None:
    data = tiny_run.workspace.root / "data" / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    text = tiny_run.workspace.config_path.read_text().replace("[data]", "[data]\nskip_bad = true")
    run = replace(tiny_run, resolved=parse_config(text, where="config.toml"))
    assert generate_prefixes(run).summary["prompts"] == 10
    [reject] = (tiny_run.workspace.root / "rejects" / "prompts.jsonl").read_text().splitlines()
    found = json.loads(reject)
    assert (found["line"], found["text"]) == (2, "{")
    assert found["reason"].startswith("not valid JSON")


@pytest.mark.parametrize("source", ["prefixes", "rollouts"])
@pytest.mark.parametrize("precision", ["float16", "q8"])
def test_verify_accepts_what_scoring_wrote(tiny_run: Run, source: str, precision: str) -> None:
    text = tiny_run.workspace.config_path.read_text().replace(
        "[scores]", f'[scores]\nprecision = "{precision}"'
    )
    run = replace(tiny_run, resolved=parse_config(text, where="config.toml"))
    (generate_prefixes if source == "prefixes" else generate_rollouts)(run)
    manifest = score_teacher(run, source_stage=source)
    assert manifest.fields["teacher.vocab_size"] == 24
    assert verify_workspace(run.workspace, CACHE_STAGES) == []


def test_a_stage_without_its_input_names_the_command(tiny_run: Run) -> None:
    with pytest.raises(TropdError, match="tropd generate-prefixes"):
        score_teacher(tiny_run)
