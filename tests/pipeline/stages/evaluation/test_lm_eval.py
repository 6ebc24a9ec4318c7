"""Tasks of lm-eval: with a stand-in for it, and where it is installed with the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation import lm_eval
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.evaluation.lm_eval import Metric, task_metrics
from tropd.storage.errors import ConfigError, FingerprintMismatchError, TropdError
from tropd.storage.verify.verify import verify_workspace

try:
    import lm_eval as real_harness
except ImportError:
    real_harness = None

TASK = """
[[evaluation.harness]]
name = "GPQA"
task = "gpqa"
limit = 5
generation = { do_sample = true, temperature = 0.6 }
"""
# What it is called with goes to a file; a task named `broken` fails, and one named `unknown` is not there.
STAND_IN = """
import json, os, sys
from pathlib import Path
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([sys.argv[1:], os.environ.get("HF_ALLOW_CODE_EVAL")]), file=calls)
if "RANK" in os.environ:
    sys.exit("waits for the other ranks")
arguments = sys.argv[1:]
task = arguments[arguments.index("--tasks") + 1]
if arguments[0] == "validate":
    sys.exit(f"no task {task}" if task == "unknown" else 0)
if task == "broken":
    sys.exit("out of memory, or so")
folder = Path(arguments[arguments.index("--output_path") + 1]) / "model"
folder.mkdir()
own = {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.05}
own |= {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}
(folder / "results_2026.json").write_text(json.dumps({"results": {task: own}}))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "stand-in" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: object())
    monkeypatch.setattr(lm_eval, "version", lambda name: "1.0")
    return tmp_path / "calls"


def said(calls: Path) -> list[list[Any]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def run_with(tmp_path: Path, extra: str) -> Run:
    run = make_run(
        tmp_path / "run",
        make_models(tmp_path / "models"),
        prompts=4,
        extra="[evaluation]\nlimit = 2\n" + extra,
    )
    (run.workspace.root / "tasks").mkdir()
    return run


def test_every_model_is_given_to_the_harness_once_and_its_metrics_are_kept(
    tmp_path: Path, calls: Path
) -> None:
    run = run_with(tmp_path, TASK)
    manifest = evaluate(run, whom=("before", "teacher"))
    expected = [
        {"name": "acc", "value": 0.25, "stderr": 0.05},
        {"name": "exact_match (strict)", "value": 0.5, "stderr": None},
    ]
    assert manifest.summary["harness"] == {"GPQA": {"before": expected, "teacher": expected}}
    validated, *runs = [arguments for arguments, _ in said(calls)]
    assert validated == ["validate", "--tasks", "gpqa"]
    assert len(runs) == 2
    line = " ".join(runs[0])
    assert f"--model hf --device cpu --model_args pretrained={tmp_path / 'models'},dtype=float32 " in line
    assert (
        "--tasks gpqa --seed 0 --batch_size 8 --limit 5 --gen_kwargs do_sample=True,temperature=0.6 " in line
    )
    assert "--apply_chat_template" not in line
    assert [f for f in verify_workspace(run.workspace) if f.severity == "error"] == []
    again = evaluate(run, whom=("before", "teacher"))
    assert again.summary == manifest.summary
    assert len(said(calls)) == 3


def test_other_settings_of_a_task_are_another_evaluation(tmp_path: Path, calls: Path) -> None:
    run = run_with(tmp_path, TASK)
    evaluate(run, whom=("before",))
    path = run.workspace.config_path
    path.write_text(path.read_text().replace("limit = 5", "limit = 6"))
    changed = Run(run.workspace, parse_config(path.read_text()), run.reporter)
    with pytest.raises(FingerprintMismatchError, match=r"harness\.GPQA\.limit: 5 → 6"):
        evaluate(changed, whom=("before",))


def test_an_unknown_task_is_refused_before_any_model_is_loaded(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tropd.pipeline.stages.evaluation.evaluate.open_engine", loaded)
    with pytest.raises(ConfigError, match="no task 'unknown'"):
        evaluate(run_with(tmp_path, TASK.replace('"gpqa"', '"unknown"')), whom=("before",))


def test_a_failure_shows_the_end_of_what_was_said_and_the_rest_is_kept(tmp_path: Path, calls: Path) -> None:
    run = run_with(tmp_path, TASK.replace('"gpqa"', '"broken"'))
    with pytest.raises(TropdError, match=r"lm-eval failed on broken \(student\)[\s\S]*out of memory"):
        evaluate(run, whom=("before",))
    assert "out of memory" in (run.workspace.logs / "lm-eval" / "GPQA-before.log").read_text()
    assert (run.workspace.stage("eval") / "part-before.parquet").exists()


def test_a_missing_library_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs lm-eval") as caught:
        evaluate(run_with(tmp_path, TASK), whom=("before",))
    assert "tropd[bench]" in str(caught.value.hint)


def test_code_runs_without_network_or_not_at_all(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, TASK + "runs_code = true\n")
    monkeypatch.setattr(lm_eval, "ISOLATED", ("no-such-program", "--"))
    with pytest.raises(ConfigError, match="process without network"):
        evaluate(run, whom=("before",))
    assert not calls.exists()
    monkeypatch.setattr(lm_eval, "ISOLATED", ("env", "ISOLATED=1"))
    evaluate(run, whom=("before",))
    (_, first), (arguments, allowed) = said(calls)
    assert first is None
    assert allowed == "1"
    assert "--confirm_run_unsafe_code" in arguments


def test_names_are_unique_among_benchmarks_and_tasks() -> None:
    other = '[[evaluation.benchmarks]]\nname = "GPQA"\nproblems = "x"\n'
    with pytest.raises(ConfigError, match="names are not unique"):
        parse_config(TASK + other)


def test_a_group_has_metrics_of_its_own() -> None:
    results = {"groups": {"mmlu": {"acc,none": 0.5}}, "results": {"mmlu": {}, "mmlu_law": {"acc,none": 0.1}}}
    assert task_metrics(results, "mmlu") == [Metric("acc", 0.5, None)]
    with pytest.raises(TropdError, match="no metric for 'gpqa'"):
        task_metrics(results, "gpqa")


@pytest.mark.skipif(real_harness is None, reason='lm-eval is not installed: pip install "tropd[bench]"')
@pytest.mark.slowest
def test_the_real_harness_runs_a_task_of_ones_own(tmp_path: Path) -> None:
    extra = '[[evaluation.harness]]\nname = "sums"\ntask = "tropd_sums"\nfolder = "tasks"\nlimit = 3\n'
    run = run_with(tmp_path, extra)
    problems = run.workspace.root / "tasks" / "sums.jsonl"
    problems.write_text("".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(4)))
    (run.workspace.root / "tasks" / "sums.yaml").write_text(
        "task: tropd_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {problems}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs:\n  until: ['#']\n  max_gen_toks: 8\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manifest = evaluate(run, whom=("before",))
    (metric,) = manifest.summary["harness"]["sums"]["before"]
    assert metric["name"] == "exact_match"
    assert 0.0 <= metric["value"] <= 1.0
