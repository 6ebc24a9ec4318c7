"""Configurations: what is refused and how, where values come from, and the way back to TOML."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.config.explain import explain
from tropd.pipeline.config.problems import unusual
from tropd.pipeline.config.recipe_files import dated_recipe, load_objective, recipe_names, recipe_text
from tropd.pipeline.config.resolve import dump_config, load_config, parse_assignment, parse_config
from tropd.pipeline.config.schema import Config, to_plain
from tropd.pipeline.training.update.optimizer import learning_rate_at
from tropd.storage.errors import ConfigError

DEMO = recipe_text("demo")


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_valid_and_name_themselves(name: str) -> None:
    assert parse_config(recipe_text(name)).config.run.recipe == name


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "did you mean 'learning_rate'", "warmup_steps"]),
        ("nonsense.field=1", ["nonsense", "unknown field", "rollout"]),
        ("train.steps='many'", ["train.steps", "valid integer", "'many'"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1"]),
        ("runtime.device='tpu'", ["runtime.device", "'cuda'"]),
        ("objective.partition.rule='magic'", ["objective.partition", "'sampled'"]),
        ("objective.partition.threshold=0.5", ["objective.partition.threshold", "unknown field"]),
        (
            "objective.partition={rule='ratio',threshold=2}",
            ["objective.partition.threshold", "less than or equal"],
        ),
        ("objective.outlier.loss.estimator='nll'", ["own samples"]),
        ("objective.schedule.kind='none'", ["no prefix tokens"]),
        ("prefixes.max_tokens=99", ["prefixes.max_tokens (99)", "rollout.max_tokens (36)"]),
        ("objective={name='tropd-cached', k=9}", ["objective.k (9)", "scores.k (5)"]),
        ("teacher.url=localhost:8000", ["teacher.url", "http://host:port", "'localhost:8000'"]),
        ("teacher.url=http://", ["teacher.url", "http://host:port"]),
        ("teacher.url=['http://one:1', 'two:2']", ["teacher.url", "http://host:port, not 'two:2'"]),
        ("teacher.url=[]", ["teacher.url", "no address is given"]),
        ("teacher.url=''", ["teacher.url", "no address is given"]),
        ("service.max_request_bytes=1024", ["service.max_request_bytes", "greater than or equal to 4096"]),
        ("evaluation.answer_pattern='#('", ["evaluation.answer_pattern", "not a regular expression"]),
        ("evaluation.answer_pattern='#.*'", ["evaluation.answer_pattern", "needs a group"]),
        ("demo.min_operations=9", ["min_operations (9)", "max_operations (5)"]),
        ("objective.name='trop'", ["unknown objective 'trop'", "did you mean 'tropd'", "full-fkl"]),
        ("train.steps=true", ["train.steps", "valid integer", "True"]),
        ("train.steps='5'", ["train.steps", "valid integer", "'5'"]),
        ("train.gradient_checkpointing=1", ["train.gradient_checkpointing", "valid boolean"]),
        ("rollout.temperature=false", ["rollout.temperature", "valid number"]),
        ("train.learning_rate=inf", ["train.learning_rate", "finite"]),
        ("train.weight_decay=nan", ["train.weight_decay", "finite"]),
        ("train.betas=[1.0, 0.9]", ["train.betas.0", "less than 1"]),
        ("train.betas=[0.9]", ["train.betas.1", "required"]),
        ("teacher.timeout_seconds=1e9", ["teacher.timeout_seconds", "less than or equal to 604800"]),
        ("train.steps=99999999999999999999", ["train.steps", "valid integer"]),
        ("no equals sign", ["section.field=value"]),
        ("=3", ["section.field=value"]),
    ],
)
def test_what_is_refused_says_where_why_and_what_would_do(assignment: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DEMO, [assignment], where="config.toml")
    assert caught.value.exit_code == 2
    for word in (*words, f"--set {assignment}"):
        assert word in str(caught.value)
    assert "config.toml:" not in str(caught.value)


def test_every_number_has_bounds() -> None:
    open_ended = [
        path
        for path, node in _numbers(Config.model_json_schema(), "")
        if not (
            node.keys() & {"minimum", "exclusiveMinimum"} and node.keys() & {"maximum", "exclusiveMaximum"}
        )
    ]
    assert not open_ended


def _numbers(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") in ("integer", "number"):
            yield path, node
        for key, inner in node.items():
            yield from _numbers(inner, f"{path}/{key}")
    elif isinstance(node, list):
        for index, inner in enumerate(node):
            yield from _numbers(inner, f"{path}/{index}")


SERVED = "[[teacher.by_domain]]\ndomain = 'a'\nmodel = 'm'\ntimeout_seconds = true\n[train]"


@pytest.mark.parametrize(
    ("new", "assignments", "message"),
    [
        ("[train]\nbetas = [1, 1]", [], "W/config.toml line {betas = [1, 1]}: train.betas.0: "),
        ("[train]\nx = '''\nX\n'''", [], "W/config.toml line {'''}: train.x: unknown field"),
        (SERVED, [], "W/config.toml line {timeout_seconds = true}: teacher.by_domain.0.timeout_seconds: "),
        (
            "[[teacher.by_domain]]\nmodel='m'\n[train]",
            [],
            "line {[[teacher.by_domain]]}: teacher.by_domain.0.domain: required",
        ),
        (
            "[train]",
            ["prefixes.max_tokens=99"],
            "prefixes.max_tokens: --set prefixes.max_tokens=99; rollout.max_tokens: W/config.toml line {max_tokens = 36}",
        ),
        ("[train]", ["demo.min_operations=9"], "min_operations: --set demo.min_operations=9"),
        ("[x]\ny = 1\n[train]", [], "W/config.toml line {[x]}: x: unknown field"),
    ],
)
def test_an_error_names_the_line_or_the_override(new: str, assignments: list[str], message: str) -> None:
    text = DEMO.replace("[train]", new, 1)
    with pytest.raises(ConfigError) as caught:
        parse_config(text, assignments, where="W/config.toml")
    # {a line} stands for its number; a value ends on it.
    if mark := re.search(r"{(.*?)}", message):
        numbers = [n for n, line in enumerate(text.splitlines(), 1) if line == mark.group(1)]
        message = message.replace(mark.group(), str(numbers[-1]))
    assert message in str(caught.value)


def test_the_absurd_is_possible_but_said() -> None:
    assignments = ["train.learning_rate=0.5", "rollout.temperature=3", "train.betas=[0.1, 0.9]"]
    resolved = parse_config(DEMO, assignments)
    sentences = unusual(resolved.config, resolved.origins)
    assert [sentence.split(" is unusual")[0] for sentence in sentences] == [
        "train.learning_rate = 0.5",
        "train.betas = [0.1, 0.9]",
        "rollout.temperature = 3.0",
    ]
    assert "--set train.learning_rate=0.5" in sentences[0]
    for name in recipe_names():
        resolved = parse_config(recipe_text(name))
        assert not unusual(resolved.config, resolved.origins)


def test_warm_up_of_a_short_trial_is_cut_with_a_word() -> None:
    resolved = parse_config(DEMO, ["train.steps=3"], where="W/config.toml")
    train = resolved.config.train
    assert [learning_rate_at(train, step) / train.learning_rate for step in range(3)] == [0.5, 1, 1]
    (sentence,) = unusual(resolved.config, resolved.origins)
    assert sentence.startswith("train.warmup_steps = 5 is no less than train.steps = 3: ")
    assert "rises over the first 2 (W/config.toml line" in sentence
    one = parse_config(DEMO, ["train.steps=1"]).config.train
    assert learning_rate_at(one, 0) == one.learning_rate


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf" + DEMO.replace("\n", "\r\n").encode())
    assert load_config(path).config == parse_config(DEMO).config


SMALL = """\
run.seed = 1
objective = { name = "tropd", trust = { loss = { estimator = "k1" } } }
[[teacher.by_domain]]
domain = "a"
model = "m"
[[evaluation.harness]]
name = "h"
task = "t"
generation = { temperature = 0.5 }
[data]
sources = [{ dataset = "d", where = { domain = ["math"] } }]
[train]
betas = [0.9, 0.95]
steps = 3
"""
NUMBERS = ["1", "-1", "0", "true", "inf", "nan", "1e400", "9" * 30, "9" * 5000, "2020-01-01", "10:00:00"]
TABLES = ["''", "{}", "[]", "{a.b.c=1}", "[[1]]", "['x']", "{rule=1}", "{name=1}", "{kind='none'}", "[" * 500]
FIELDS = [
    "train",
    "train.steps",
    "objective",
    "objective.name",
    "teacher.by_domain",
    "data.sources",
    "a." * 99 + "a",
]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_mangled_configuration_is_read_or_refused(data: st.DataObject) -> None:
    lines = SMALL.splitlines()
    values = st.sampled_from([*NUMBERS, *TABLES]) | st.text(max_size=12)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        key, value = lines[index].partition("=")[0], data.draw(values)
        lines[index] = data.draw(
            st.sampled_from([f"{key}={value}", value, key, f"{lines[index]}\n{lines[index]}"])
        )
    assignment = f"{data.draw(st.sampled_from(FIELDS))}={data.draw(values)}"
    with suppress(ConfigError):
        parse_config("\n".join(lines), data.draw(st.sampled_from([[], [assignment]])))


def test_malformed_toml_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"here\.toml is not valid TOML.*line 2"):
        parse_config("[run]\nseed = = 1\n", where="here.toml")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"[run]\xff")
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        load_config(tmp_path / "none.toml")


def test_unknown_recipes_list_those_there_are() -> None:
    with pytest.raises(ConfigError, match="demo-mismatch"):
        recipe_text("demo-mismatched")


def test_values_know_where_they_come_from() -> None:
    resolved = parse_config(DEMO, ["train.learning_rate=1e-5", "run.seed=3"], where="W/config.toml")
    assert resolved.config.train.learning_rate == 1e-5
    sources = {
        path: explain(resolved, path)[0].source
        for path in ("train.learning_rate", "train.steps", "train.betas")
    }
    assert sources == {
        "train.learning_rate": "--set train.learning_rate=1e-5",
        "train.steps": "W/config.toml",
        "train.betas": "default",
    }
    assert explain(resolved, "objective.partition.rule")[0].source == "objective 'tropd'"
    assert len(explain(resolved, "train")) > 10
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        explain(resolved, "train.step")


def test_every_field_is_documented() -> None:
    for name in recipe_names("objectives"):
        config = parse_config(DEMO, [f"objective={{name='{name}'}}", "rollout.samples_per_prompt=2"])
        undocumented = [f.path for f in explain(config, "") if not f.documentation]
        assert all(path.endswith((".rule", ".estimator", ".kind")) for path in undocumented)


@pytest.mark.parametrize("name", recipe_names("objectives"))
def test_a_dumped_configuration_reads_back_equal(name: str) -> None:
    config = parse_config(DEMO, [f"objective={{name='{name}'}}", "rollout.samples_per_prompt=2"]).config
    assert parse_config(dump_config(config)).config == config


def test_overrides_mix_within_a_kind_and_replace_across_kinds() -> None:
    clip = load_objective("tropd-clip", {"outlier": {"weight": 0.5}})
    assert clip.outlier.loss.estimator == "k1"
    assert clip.outlier.weight == 0.5
    ratio = load_objective("eopd", {"partition": {"rule": "ratio"}})
    assert ratio.partition.model_dump() == {"rule": "ratio", "threshold": 1.0}  # not EOPD's 0.8


def test_assignments_are_toml_or_plain_text() -> None:
    assert parse_assignment("a.b=3") == {"a": {"b": 3}}
    assert parse_assignment("a.b=true") == {"a": {"b": True}}
    assert parse_assignment("a=/some/path") == {"a": "/some/path"}
    assert parse_assignment("a=x=y") == {"a": "x=y"}


@settings(deadline=None)
@given(
    st.floats(1e-12, 1e3),
    st.text(max_size=20),
    st.floats(-1e6, -1e-9),
    st.integers(0, 2**31 - 1),
)
def test_any_value_survives_the_way_to_toml_and_back(
    rate: float, model: str, floor: float, seed: int
) -> None:
    plain = to_plain(parse_config(DEMO).config)
    plain["train"]["learning_rate"] = rate
    plain["teacher"]["model"] = model
    plain["run"]["seed"] = seed
    plain["objective"]["trust"]["loss"] = {"estimator": "k1", "floor": floor}
    config = Config.model_validate(plain)
    assert parse_config(dump_config(config)).config == config


def test_one_teacher_service_or_several() -> None:
    for assignments, urls in (
        ([], ()),
        (["teacher.url=http://one:1"], ("http://one:1",)),
        (
            ["teacher.url=['http://one:1', 'https://two:2/teacher']"],
            ("http://one:1", "https://two:2/teacher"),
        ),
    ):
        config = parse_config(DEMO, assignments).config
        assert config.teacher.urls == urls
        assert parse_config(dump_config(config)).config.teacher == config.teacher


def test_a_recipe_with_a_chat_template_gets_the_date_that_templates_tell() -> None:
    day = datetime.date(2025, 3, 7)
    text = dated_recipe(recipe_text("qwen3-sft-1.7b"), day)
    config = parse_config(text).config
    assert config.data.template_date == day
    assert parse_config(dump_config(config)).config == config
    assert dated_recipe(text, datetime.date(2026, 1, 1)) == text
    assert dated_recipe(recipe_text("demo"), day) == recipe_text("demo")
