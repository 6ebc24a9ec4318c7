"""Settings that exclude each other, or that nothing would come of: refused wherever they are given."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tropd.pipeline.config.keyword_settings import as_assignments, flat
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.api import distill
from tropd.storage.errors import ConfigError

LIGHTEVAL = """
objective.name = 'effopd'
objective.extrapolation.problems = 'b'
evaluation.benchmarks = [{ name = 'b', problems = 'p', lighteval = { task = 't', module = 'm' } }]
"""
# Settings, the field that the refusal names, and what it says to do.
OBJECTIVES = [
    (
        "name = 'top-d'\ntrust.loss.baseline = 'kl'",
        "trust.loss.baseline",
        "set trust.loss.returns = false, or trust.loss.baseline = 'none'",
    ),
    (
        "name = 'tropd'\noutlier.loss = { estimator = 'k1', baseline = 'kl', standardize = true }",
        "outlier.loss.baseline",
        "set outlier.loss.standardize = false, or outlier.loss.baseline = 'none'",
    ),
    ("name = 'opd'\ntrust.loss.estimator = 'nll'", "trust.loss.estimator", "use k1 or a top-k divergence"),
    ("name = 'tropd'\nguidance.loss.estimator = 'k1'", "guidance.loss.estimator", "zero, nll and topk_fkl"),
    ("name = 'tropd'\nschedule.kind = 'none'", "schedule.kind", "guidance.loss.estimator = 'zero'"),
    ("name = 'tropd'\nrollouts = 'teacher'", "rollouts", "kind = 'constant', fraction = 1.0"),
    ("name = 'offline-opd'\nschedule.kind = 'cosine'", "schedule.kind", "set schedule.kind = 'none'"),
    ("name = 'eopd'\nrollouts = 'stored'", "rollouts", "rollouts = 'student'"),
    ("name = 'opd'\ntrust.weight = 0", "trust.weight", "trust.weight above 0"),
    ("name = 'opd'\npartition.rule = 'none'", "partition.rule", "set outlier.loss.estimator"),
    ("name = 'sft'\nguidance.weight = 0", "guidance.weight", "guidance.weight above 0"),
    (
        "name = 'sft'\n[[objective.token_weights]]\nkind = 'prefix_importance'",
        "token_weights",
        "leave token_weights out",
    ),
    (
        "name = 'rkl-topk'\noutlier.loss.stop_gradient = true",
        "outlier.loss.stop_gradient",
        "set outlier.loss.support = 'truncated'",
    ),
    (
        "name = 'rkl-topk-sg'\noutlier.loss.sample_corrected = true",
        "outlier.loss.sample_corrected",
        "set outlier.loss.support = 'tail'",
    ),
    (
        "name = 'full-fkl'\noutlier.loss = { support = 'tail', entry_clip = 0.1 }",
        "outlier.loss.entry_clip",
        "leave outlier.loss.entry_clip out",
    ),
    ("name = 'opd'\nalternatives = 'student'", "alternatives", "leave alternatives out"),
    ("name = 'rkl-topk'\nrollouts = 'stored'", "rollouts", "set alternatives = 'teacher'"),
    ("name = 'fire-opd'\nrollouts = 'stored'", "rollouts", "rollouts = 'student'"),
    ("name = 'full-fkl'\nimportance.clip = 2", "importance.clip", "leave importance.clip out"),
    ("name = 'sft'\nimportance.clip = 2", "importance.clip", "leave importance.clip out"),
]
CONFIGURATIONS = [
    ("prefixes.max_tokens = 9000", "prefixes.max_tokens", "lower prefixes.max_tokens"),
    ("student.engine = 'vllm'\nvllm.max_model_len = 8097", "vllm.max_model_len", "lower rollout.max_tokens"),
    (
        "teacher.engine = 'vllm'\nvllm.max_model_len = 9000\nevaluation.max_tokens = 8999",
        "evaluation.max_tokens",
        "lower evaluation.max_tokens, or raise vllm.max_model_len",
    ),
    (
        "objective.name = 'grpo'\nrollout.samples_per_prompt = 1",
        "rollout.samples_per_prompt",
        "set rollout.samples_per_prompt = 2 or more, or objective.reward.distillation above 0",
    ),
    (
        (
            "objective = { name = 'tropd-noguidance', outlier.weight = 0, "
            "reward = { kind = 'group', distillation = 0 } }\nrollout.samples_per_prompt = 1"
        ),
        "objective.reward.distillation",
        "nothing would be trained",
    ),
    ("objective.name = 'tropd-cached'\nscores.k = 9", "scores.k", "lower objective.k, or raise scores.k"),
    (
        "scores.k = 9\n[objective]\nname = 'offline-opd'\ntrust.loss.baseline = 'kl'",
        "scores.k",
        "lower objective.k, or raise scores.k",
    ),
    (
        "objective = { name = 'offline-opd', importance = { clip = 2.0 } }\nrollout.temperature = 0.5",
        "rollout.temperature",
        "needs rollout.temperature = 1",
    ),
    (
        "objective.name = 'eopd'\nteacher.engine = 'vllm'",
        "teacher.engine",
        "set teacher.scoring_engine = 'transformers'",
    ),
    (
        "objective.name = 'eopd'\n[[teacher.by_domain]]\ndomain = 'a'\nmodel = 'm'\nengine = 'vllm'",
        "teacher.by_domain",
        "another objective.partition.rule",
    ),
    (
        "objective.name = 'rkl-topk'\nteacher.engine = 'vllm'",
        "teacher.engine",
        "set teacher.scoring_engine = 'transformers'",
    ),
    (
        "objective.name = 'fire-opd'\nteacher.engine = 'vllm'",
        "teacher.engine",
        "another objective.token_weights",
    ),
    (
        "service.max_request_tokens = 8096",
        "service.max_request_tokens",
        "raise service.max_request_tokens",
    ),
    (
        "train.dropout = true\nstudent.engine = 'vllm'",
        "train.dropout",
        "set train.dropout = false, or student.engine = 'transformers'",
    ),
    (
        "train.region_gradients = true\nruntime.compile = true",
        "train.region_gradients",
        "set train.region_gradients = false, or runtime.compile = false",
    ),
    (
        "train.attention = 'flash_attention_2'\nstudent.dtype = 'float32'",
        "student.dtype",
        "set student.dtype = 'bfloat16', or train.attention = 'auto'",
    ),
    (
        "train.attention = 'flash_attention_3'\nruntime.device = 'cpu'",
        "runtime.device",
        "set runtime.device = 'cuda', or train.attention = 'auto'",
    ),
    (
        "objective.name = 'effopd'\ntrain.max_staleness = 1",
        "train.max_staleness",
        "set train.max_staleness = 0, or leave objective.extrapolation out",
    ),
    (
        "objective.name = 'effopd'\nobjective.extrapolation.problems = 'b'",
        "objective.extrapolation.problems",
        "set the name of one, or leave objective.extrapolation.problems out",
    ),
    (
        "objective.name = 'effopd'\ndata.answer_field = ''",
        "data.answer_field",
        "set data.answer_field, or objective.extrapolation.score = 'reverse_kl'",
    ),
    (
        LIGHTEVAL,
        "objective.extrapolation.problems",
        "set the name of another benchmark, or objective.extrapolation.score = 'reverse_kl'",
    ),
    (
        "objective.name = 'grpo'\nobjective.extrapolation.score = 'reverse_kl'",
        "objective.extrapolation.score",
        "set objective.extrapolation.score = 'accuracy'",
    ),
    ("evaluation.pass_at = [4]", "evaluation.pass_at", "raise samples, or lower pass_at"),
    (
        "evaluation.benchmarks = [{ name = 'b', problems = 'p', samples = 4, pass_at = [8] }]",
        "evaluation.benchmarks",
        "raise samples, or lower pass_at",
    ),
    (
        "evaluation.benchmarks = [{ name = 'eval', problems = 'p' }]",
        "evaluation.benchmarks",
        "set another name",
    ),
    (
        "[evaluation]\nbenchmarks = [{ name = 'b', problems = 'p' }]\nharness = [{ name = 'b', task = 't' }]",
        "evaluation.benchmarks",
        "another name",
    ),
    (
        "data.answer_field = ''\nevaluation.benchmarks = [{ name = 'b', problems = 'p' }]",
        "data.answer_field",
        "set data.answer_field, or that of the benchmark",
    ),
    (
        "data.answer_field = ''\nevaluation.distance_prompts = 0",
        "evaluation.distance_prompts",
        "set data.answer_field, or leave evaluation.distance_prompts out",
    ),
    (
        "data.answer_field = ''\nprefixes.keep = 'correct'",
        "prefixes.keep",
        "set data.answer_field, or prefixes.keep = 'all'",
    ),
    (
        "data.answer_field = ''\ndata.sources = [{ dataset = 'd', answer = 'a' }]",
        "data.answer_field",
        "set data.answer_field",
    ),
    (
        "data.domain_field = ''\ndata.sources = [{ dataset = 'd', domain = 'a' }]",
        "data.domain_field",
        "set data.domain_field",
    ),
    ("demo = { enabled = true, models = 'smollm2' }", "demo.models", "set data.chat = true"),
    ("data.system = 'Be brief.'", "data.system", "set data.chat = true"),
    ("teacher.chat_template_file = 'a.jinja'", "teacher.chat_template_file", "set data.chat = true"),
    (
        "demo.enabled = true\ndata.prompt_field = 'question'",
        "data.prompt_field",
        "leave data.prompt_field and data.answer_field out",
    ),
]
CONFLICTS = [
    *((f"[objective]\n{text}", f"objective.{path}", fix) for text, path, fix in OBJECTIVES),
    *CONFIGURATIONS,
]
ids = [path for _, path, _ in CONFLICTS]


@pytest.mark.parametrize(("text", "path", "fix"), CONFLICTS, ids=ids)
def test_a_conflict_is_refused_with_the_field_its_line_and_what_to_do(text: str, path: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, where="W/config.toml")
    name = path.removeprefix("objective.")
    assert f"{name}: W/config.toml line " in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.parametrize(("text", "path", "fix"), CONFLICTS, ids=ids)
def test_so_it_is_as_an_override_and_through_the_python_door(
    text: str, path: str, fix: str, tmp_path: Path
) -> None:
    settings = tomllib.loads(text)
    with pytest.raises(ConfigError) as caught:
        parse_config("", as_assignments(settings))
    assert fix in str(caught.value)
    assert f"{path.removeprefix('objective.')}: --set " in str(caught.value)
    workspace = tmp_path / "W"
    with pytest.raises(ConfigError) as caught:
        distill(teacher="t", student="s", prompts=["1 + 1 ="], workspace=workspace, **flat(settings))
    assert fix in str(caught.value)
    assert not workspace.exists()


def test_several_conflicts_are_told_at_once() -> None:
    text = "[objective]\nname = 'sft'\nimportance.clip = 2\nguidance.weight = 0"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, where="W/config.toml")
    first, second, *_ = str(caught.value).splitlines()
    assert "guidance.weight: W/config.toml line 4" in first
    assert "leave importance.clip out (importance.clip: W/config.toml line 3" in second


@pytest.mark.parametrize(
    "text",
    [
        "name = 'tropd'\npartition.rule = 'all'",
        "name = 'tropd'\npartition.rule = 'none'",
        "name = 'tropd'\nguidance.weight = 0",
        "name = 'tropd-noguidance'\noutlier.loss = { estimator = 'k1', returns = true, reward_scale = 1.5 }",
        "name = 'vopd'\ntrust.loss.floor = -3",
        "name = 'opd'\nschedule.length = 'uniform'",
        "name = 'full-fkl'\npartition.rule = 'sampled'\nimportance.clip = 2",
    ],
)
def test_ablations_that_leave_a_part_without_tokens_are_none(text: str) -> None:
    parse_config(f"[objective]\n{text}")


@pytest.mark.parametrize(
    "text",
    [
        "objective.name = 'eopd'\nteacher = { engine = 'vllm', url = 'http://teacher:8000' }",
        "teacher.url = 'http://teacher:8000'\nservice.max_request_tokens = 99",
        "objective.name = 'sft'\nservice.max_request_tokens = 99",
        "train.attention = 'flash_attention_2'",
        "student.engine = 'vllm'\nvllm.max_model_len = 8098",
        "vllm.max_model_len = 99",
        "data.answer_field = ''\nevaluation.benchmarks = [{ name = 'b', problems = 'p', answer_field = 'a' }]",
        "scores.k = 9\nobjective.name = 'offline-opd'",
        "rollout.samples_per_prompt = 1\nobjective.name = 'dgrpo'",
        (
            "rollout.samples_per_prompt = 1\n"
            "objective = { name = 'tropd-noguidance', reward = { kind = 'group', distillation = 0 } }"
        ),
        (
            "rollout.samples_per_prompt = 1\nobjective.name = 'grpo'\n"
            "reward = { source = 'function', function = 'own:judge', per = 'token' }"
        ),
    ],
)
def test_the_possible_is_not_refused(text: str) -> None:
    parse_config(text)


def test_arguments_of_a_chat_template_are_its_own() -> None:
    with pytest.raises(
        ConfigError, match=r"student\.chat_template_args is for the chat template.*leave student"
    ):
        parse_config("student.chat_template_args = { enable_thinking = false }\nobjective.name = 'opd'")
    with pytest.raises(ConfigError, match=r"teacher\.chat_template_args: tokenize cannot be set here"):
        parse_config("data.chat = true\nteacher.chat_template_args.tokenize = false\nobjective.name = 'opd'")
