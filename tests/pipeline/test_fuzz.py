"""Whatever is in a prompt file, a configuration or a chat template: it is read, or refused in words. Never another error.

The same examples each time; many more, and others each time, with TROPD_THOROUGH=1.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tiny_runs import CONFIG

from tropd.pipeline.config.explain import explain
from tropd.pipeline.config.resolve import dump_config, load_config, parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.data_settings import DataConfig, Source
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models.tokenizers import check_tokenizers
from tropd.pipeline.problems.decontaminate import overlaps
from tropd.pipeline.problems.encoding import Encoded, encode_prompts, tokens_of
from tropd.pipeline.problems.prompts import Prompt, refuse, scan_prompts, write_rejects
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.fetch import fetch_sources
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.workspace import Workspace

THOROUGH = "TROPD_THOROUGH" in os.environ


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=20 * examples if THOROUGH else examples,
        derandomize=not THOROUGH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------------------------------------------- prompt files

texts = st.one_of(
    st.sampled_from(
        ["1+1=", "", " ", "é漢😀", "a\r\nb", "\ud800", "\u2028", "\x00", '"', "nan", "42.0", "x" * 300]
    ),
    st.text(st.characters(), max_size=8),
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -0.0, 1e16, 42.0, 2**63]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
roles = st.sampled_from(["system", "user", "assistant", "tool", "", None, 7])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": scalars}, optional={"name": scalars}), max_size=3
)
values = st.one_of(
    texts,
    scalars,
    messages,
    st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=4),
)
FIELDS = ("id", "prompt", "answer", "domain", "messages", "a.b")
asked = st.one_of(st.just("1+1="), st.just("é漢😀"), messages, texts, values)
answers = st.one_of(st.just("2"), numbers, texts, values)
rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": asked, "messages": messages, "answer": answers}),
        st.fixed_dictionaries({"prompt": st.just("1+1="), "id": answers}, optional={"domain": answers}),
        st.dictionaries(st.sampled_from(FIELDS), values),
    ),
    min_size=1,
    max_size=5,
)


def problem(work: Callable[[], object]) -> str:
    """How the work is refused, in words; nothing if it is done. Any other error is one of ours."""
    try:
        work()
    except TropdError as error:
        return str(error)
    return ""


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_raw_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def as_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode("utf-16")


def as_parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), sink)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        assume(False)
    return sink.getvalue()


def as_csv(rows: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


Change = tuple[str, float, bytes]
changes = st.lists(
    st.tuples(
        st.sampled_from(["cut", "insert", "overwrite"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)
    ),
    max_size=2,
)
changes = st.one_of(st.just([]), changes)


def damaged(content: bytes, changes: list[Change]) -> bytes:
    for kind, where, what in changes:
        at = int(where * len(content))
        rest = {"cut": b"", "insert": what + content[at:], "overwrite": what + content[at + len(what) :]}
        content = content[:at] + rest[kind]
    return content


paths = st.sampled_from([*FIELDS, "messages.0.content", "answer.0", "messages.x", "", ".", "a.b.c"])
data_configs = st.builds(
    DataConfig,
    id_field=st.sampled_from(["id", "id", "answer.0"]),
    prompt_field=st.one_of(st.just("prompt"), st.just("prompt"), st.just("messages"), paths),
    answer_field=st.one_of(st.just("answer"), paths),
    chat=st.booleans(),
)
forms = st.sampled_from(
    [("lines", as_lines), ("raw", as_raw_lines), ("json", as_array), ("parquet", as_parquet), ("csv", as_csv)]
)


def read(path: Path, config: DataConfig, need_answer: bool) -> None:
    """All that the stages do with a prompt file before they tokenize."""
    prompts, rejects = scan_prompts(path, config, need_answer=need_answer)
    for prompt in prompts:
        assert all(type(text) is str for text in (prompt.id, prompt.text, prompt.domain, prompt.answer or ""))
        f"{prompt.id}{prompt.text}{prompt.domain}{prompt.answer}".encode()
        assert prompt.text.strip()
        assert not need_answer or prompt.answer
        assert json.dumps(list(prompt.turns), allow_nan=False)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    overlaps(prompts, [("evaluation", prompt) for prompt in prompts], 2)
    write_rejects(path, rejects, path.with_name("rejects.jsonl"))
    assert len(path.with_name("rejects.jsonl").read_text().splitlines()) == len(rejects)
    refuse(path, rejects)


@fuzzed(150)
@given(rows=rows, form=forms, changes=changes, config=data_configs, need_answer=st.booleans())
def test_prompt_files(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    form: tuple[str, Callable[[list[Any]], bytes]],
    changes: list[Change],
    config: DataConfig,
    need_answer: bool,
) -> None:
    suffix, write = form
    path = folder(tmp_path_factory) / f"p.{suffix}"
    path.write_bytes(damaged(write(rows), changes))
    refused = problem(lambda: read(path, config, need_answer))
    assert not refused or str(path) in refused


@fuzzed(60)
@given(rows=rows, form=forms, config=data_configs, skip_bad=st.booleans())
def test_what_is_fetched_can_be_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    form: tuple[str, Callable[[list[Any]], bytes]],
    config: DataConfig,
    skip_bad: bool,
) -> None:
    suffix, write = form
    workspace = Workspace.create(folder(tmp_path_factory))
    (workspace.root / f"raw.{suffix}").write_bytes(write(rows))
    resolved = parse_config(CONFIG.format(models='"m"'))
    data = config.model_copy(
        update={"skip_bad": skip_bad, "id_field": "id", "prompt_field": "q", "answer_field": "a"}
    )
    run = Run(workspace, replace(resolved, config=resolved.config.model_copy(update={"data": data})), SILENT)
    source = Source(dataset=f"raw.{suffix}", prompt=config.prompt_field, answer=config.answer_field)
    if refused := problem(lambda: fetch_sources(run, [source], force=True)):
        assert f"raw.{suffix}" in refused
    else:
        read(workspace.resolve(data.prompts), data, need_answer=True)


# -------------------------------------------------------------------------------------------------- configurations


def fields(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, those that are sections too."""
    found = []
    for name, info in model.model_fields.items():
        found.append(f"{prefix}{name}")
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += fields(kind, f"{prefix}{name}.")
    return found


toml_values = st.one_of(
    st.sampled_from(
        [
            "true",
            "-1",
            "0",
            "1",
            "9" * 30,
            "1e400",
            "inf",
            "nan",
            "1.5",
            '""',
            '"x"',
            "'{prompt}'",
            "[]",
            "{}",
            "[[]]",
        ]
    ),
    st.sampled_from(
        ["[1, 'a']", "{a = 1}", "2020-01-01", "12:00:00", '["http://x"]', '"(#"', "[" * 200 + "]" * 200, "="]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=6).map(lambda text: json.dumps(text, ensure_ascii=False)),
)
assignments = st.lists(st.tuples(st.sampled_from(fields()), toml_values), min_size=1, max_size=3)


def resolve(config: Callable[[], Any]) -> None:
    """A configuration is refused, or is what its own text says."""
    try:
        resolved = config()
    except ConfigError:
        return
    assert parse_config(dump_config(resolved.config)).config == resolved.config
    assert explain(resolved, "train")


@fuzzed(150)
@given(assignments=assignments, as_options=st.booleans(), changes=changes)
def test_configurations(
    tmp_path_factory: pytest.TempPathFactory,
    assignments: list[tuple[str, str]],
    as_options: bool,
    changes: list[Change],
) -> None:
    path = folder(tmp_path_factory) / "config.toml"
    lines = [f"{name} = {value}" for name, value in assignments]
    options = [f"{name}={value}" for name, value in assignments] if as_options else []
    content = CONFIG.format(models='"m"') if as_options else "\n".join(['student.model = "m"', *lines])
    path.write_bytes(damaged(content.encode("utf-8", "surrogatepass"), changes))
    resolve(lambda: load_config(path, options))


# -------------------------------------------------------------------------------------------------- chat templates

pieces = st.sampled_from(
    [
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m['content'] }}",
        "{{ m.role }}=",
        "{% if m.role == 'system' %}",
        "{% endif %}",
        "{% if add_generation_prompt %}=",
        "{{ raise_exception('roles must alternate') }}",
        "{{ nothing }}",
        "{{ nothing.at.all }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ m.content + 1 }}",
        "{{ messages | random }}",
        "{{ range(9) | random }}",
        "{{ messages | tojson }}",
        "{{ strftime_now('%d') }}",
        "{{ bos_token }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{% generation %}",
        "{{ ''.__class__.__mro__ }}",
        "{{",
        "%}",
        "{#",
        "1+1",
        "\ud800",
        " ",
    ]
)
whole_templates = st.sampled_from(
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}=",
        "{{ messages[-1].content }}{% if add_generation_prompt %}={% endif %}",
    ]
)
one_template = st.one_of(whole_templates, st.lists(pieces, max_size=6).map("".join), st.text(max_size=5))
templates = st.one_of(
    one_template,
    st.none(),
    st.dictionaries(st.sampled_from(["default", "tool_use"]), one_template),
    st.sampled_from([7, ["{{ messages }}"]]),
)
talks = st.sampled_from(
    [
        (),
        ({"role": "system", "content": "1"}, {"role": "user", "content": "2+2="}),
        ({"role": "user", "content": "1"}, {"role": "tool", "content": "", "name": {"x": [1.5]}}),
    ]
)
prompts = st.lists(
    st.builds(Prompt, st.just("p"), st.sampled_from(["1+1=", "1", "é漢😀"]), st.none(), messages=talks)
)


@fuzzed(120)
@given(template=templates, prompts=prompts, chat=st.sampled_from([True, True, True, False]))
def test_chat_templates(template: Any, prompts: list[Prompt], chat: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    encoded: list[Encoded] = []

    def encode() -> None:
        encoded.append(encode_prompts(prompts, tokenizer, chat=chat, max_length=30))
        check_tokenizers(tokenizer, make_tokenizer())

    problem(encode)
    for found in encoded:
        assert len(found.prompts) == len(prompts) - len(found.rejects)
        assert all(type(token) is int for one in found.prompts for token in one.tokens)
        assert found.rejects or all(tokens_of(found.prompts))
        for reject in found.rejects:
            reject.reason.encode()


def folder(factory: pytest.TempPathFactory) -> Path:
    """One for all examples of all tests: each writes its own files anew."""
    path = factory.getbasetemp() / "fuzz"
    path.mkdir(exist_ok=True)
    return path
