"""Prompts from datasets of every kind, mixed into one file. No network: everything is made on the spot."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_models, make_run

from tropd.pipeline.config.sections.data_settings import DataConfig, Source
from tropd.pipeline.experiments.paper_data import EVALUATIONS, training_source
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.fetch import fetch_sources, interleaved, mixture
from tropd.storage.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def test_further_fields_are_carried_and_needed(run: Run, tmp_path: Path) -> None:
    records = [{"q": f"{n}+1=", "solution": f"{n}, then one more", "hint": n} for n in range(3)]
    path = write(tmp_path / "q.parquet", records)
    source = Source(dataset=str(path), prompt="q", fields={"solution": "solution", "note": "hint"})
    fetch_sources(run, [source])
    assert lines(run)[1] == {"id": "1", "prompt": "1+1=", "solution": "1, then one more", "note": "1"}
    fetch_sources(run, [source])  # the record has them
    missing = source.model_copy(update={"fields": {"note": "nothing"}})
    with pytest.raises(ConfigError, match="was made of other sources"):
        fetch_sources(run, [missing])
    with pytest.raises(DataError, match=r"no field 'nothing' \(fields: hint, q, solution; see fields.note\)"):
        fetch_sources(run, [missing], force=True)


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Run:
    made = make_run(tmp_path / "run", models)
    (made.workspace.root / "data" / "train.jsonl").unlink()
    return made


def lines(run: Run, file: str = "data/train.jsonl") -> list[dict[str, Any]]:
    text = (run.workspace.root / file).read_text()
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(str(path))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path


def changed(run: Run, **data: Any) -> Run:
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update=data)})
    return replace(run, resolved=replace(run.resolved, config=config))


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}", "answer": str(n)} for n in range(count)]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "saved"])
def test_files_of_every_kind_are_read(run: Run, name: str) -> None:
    write(run.workspace.root / "raw" / name, numbered("q", 3))
    fetch_sources(run, [Source(dataset=f"raw/{name}", answer="answer")])
    assert lines(run) == [{"id": str(n), "prompt": f"q {n}", "answer": str(n)} for n in range(3)]


def test_a_saved_dictionary_of_splits(run: Run, tmp_path: Path) -> None:
    both = {"train": numbered("t", 1), "test": numbered("e", 2)}
    made = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in both.items()})
    made.save_to_disk(str(tmp_path / "saved"))
    fetch_sources(run, [Source(dataset=str(tmp_path / "saved"), split="test")])
    assert [line["prompt"] for line in lines(run)] == ["e 0", "e 1"]
    with pytest.raises(ConfigError, match="cannot be read"):
        fetch_sources(run, [Source(dataset=str(tmp_path / "saved"), split="none", file="data/x.jsonl")])


def test_nested_columns_filters_limits_and_repeated_prompts(run: Run) -> None:
    records = [
        {"domain": domain, "conversations": [{"value": text}, {"value": "…"}]}
        for domain, text in [
            ("math", "1+1?"),
            ("code", "sort"),
            ("math", "1+1?"),
            ("math", "2+2?"),
            ("math", "3+3?"),
        ]
    ]
    write(run.workspace.root / "raw" / "train.jsonl", records)
    source = Source(dataset="raw", prompt="conversations.0.value", where={"domain": ("math",)}, limit=2)
    fetch_sources(run, [source])
    assert lines(run) == [{"id": "0", "prompt": "1+1?"}, {"id": "1", "prompt": "2+2?"}]


def test_domains_are_mixed_in_their_shares_wherever_one_looks(run: Run) -> None:
    write(run.workspace.root / "raw" / "math.jsonl", numbered("m", 60))
    write(run.workspace.root / "raw" / "code.jsonl", numbered("c", 90))
    sources = [
        Source(dataset="raw/math.jsonl", domain="math", weight=3),
        Source(dataset="raw/code.jsonl", domain="code", weight=1),
    ]
    made = fetch_sources(run, sources)
    assert [part["prompts"] for part in made["data/train.jsonl"]["parts"]] == [60, 20]
    found = lines(run)
    assert len({line["id"] for line in found}) == 80
    for low in range(0, 80, 8):
        assert Counter(line["domain"] for line in found[low : low + 8]) == {"math": 6, "code": 2}
    prompts, rejects = scan_prompts(run.workspace.resolve("data/train.jsonl"), DataConfig())
    assert rejects == []
    assert {p.domain for p in prompts} == {"math", "code"}


def test_what_is_there_is_kept_unless_it_was_made_of_something_else(run: Run) -> None:
    write(run.workspace.root / "raw.jsonl", numbered("q", 3))
    fetch_sources(run, [Source(dataset="raw.jsonl")])
    before = lines(run)
    write(run.workspace.root / "raw.jsonl", numbered("changed", 3))
    assert fetch_sources(run, [Source(dataset="raw.jsonl")])["data/train.jsonl"]["prompts"] == 3
    assert lines(run) == before
    with pytest.raises(ConfigError, match="made of other sources"):
        fetch_sources(run, [Source(dataset="raw.jsonl", limit=1)])
    fetch_sources(run, [Source(dataset="raw.jsonl", limit=1)], force=True)
    assert [line["prompt"] for line in lines(run)] == ["changed 0"]


def test_files_that_a_person_put_there_are_left_alone(run: Run) -> None:
    path = run.workspace.root / "data" / "train.jsonl"
    path.write_text('{"prompt": "mine"}\n')
    assert fetch_sources(run, [Source(dataset="nowhere")]) == {"data/train.jsonl": {}}
    assert path.read_text() == '{"prompt": "mine"}\n'


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (
            {"dataset": "raw.jsonl", "prompt": "question"},
            DataError,
            r"records 1, 2: no field 'question' \(fields: answer, prompt; see prompt\)",
        ),
        ({"dataset": "raw.jsonl", "where": {"answer": ("x",)}}, DataError, "has no record with"),
        ({"dataset": "raw.jsonl", "answer": "key"}, DataError, "records 1, 2: no field 'key'"),
        (
            {"dataset": "raw.jsonl", "where": {"kind": ("x",)}},
            DataError,
            "records 1, 2: no field 'kind' for where",
        ),
        ({"dataset": "raw.txt"}, DataError, "record 1: not valid JSON"),
        ({"dataset": "/nowhere/at/all"}, ConfigError, r"put the prompts into data/train\.jsonl"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    run: Run, source: dict[str, Any], error: type[Exception], words: str
) -> None:
    write(run.workspace.root / "raw.jsonl", numbered("q", 2))
    (run.workspace.root / "raw.txt").write_text("x")
    with pytest.raises(error) as caught:
        fetch_sources(run, [Source(**source)])
    assert re.search(words, f"{caught.value} {getattr(caught.value, 'hint', '')}")
    assert not (run.workspace.root / "data" / "train.jsonl").exists()


def test_the_tables_name_files_that_their_recipes_read() -> None:
    assert [source.file for source in EVALUATIONS] == [
        f"data/{n}.jsonl" for n in ("aime24", "aime25", "amc23")
    ]
    assert training_source(["math", "code"], 5).where == {"domain": ("math", "code")}


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    data=st.data(),
)
def test_mixtures_keep_their_shares_and_use_one_source_up(sizes: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.05, 1.0)) for _ in sizes]
    counts = mixture(sizes, weights)
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    shares = [weight / sum(weights) for weight in weights]
    most = min(size / share for size, share in zip(sizes, shares, strict=True))
    assert all(abs(count - share * most) <= 1 for count, share in zip(counts, shares, strict=True))
    assert mixture(sizes, [None] * len(sizes)) == sizes


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_interleaving_has_every_line_once_and_evenly(counts: list[int]) -> None:
    order = interleaved(counts)
    assert sorted(order) == [(i, n) for i, count in enumerate(counts) for n in range(count)]
    for index, count in enumerate(counts):
        for end in range(1, len(order) + 1):
            so_far = sum(1 for i, _ in order[:end] if i == index)
            assert abs(so_far - count * end / len(order)) <= len(counts)


MIXED = [
    {"prompt": "p1", "answer": 42, "kind": True},
    {"prompt": "p2", "answer": 42.0},
    {"prompt": "p3", "answer": True},
    {"prompt": "p4", "answer": ["1", "2"]},
    {"prompt": "p5", "answer": ""},
    {"prompt": "p6", "answer": 1e16},
    {"prompt": [{"role": "user", "content": "p7"}], "answer": "7"},
    {"prompt": None, "answer": "8"},
]


def test_values_are_read_as_a_run_reads_them_or_refused(run: Run) -> None:
    write(run.workspace.root / "raw.jsonl", MIXED)
    source = Source(dataset="raw.jsonl", answer="answer")
    with pytest.raises(DataError) as caught:
        fetch_sources(run, [source])
    for words in (
        "record 3: field 'answer' is true",
        "record 4: field 'answer' is a list of 2 values, not text; name one of its values in answer: answer.0",
        "record 5: field 'answer' is empty",
        'record 7: .*set data.chat = true, or name one text: prompt = "prompt.0.content"',
        "record 8: field 'prompt' is null",
        "data.skip_bad=true",
    ):
        assert re.search(words, str(caught.value)), words
    assert not (run.workspace.root / "data" / "train.jsonl").exists()
    fetch_sources(changed(run, skip_bad=True), [source])
    assert [(line["prompt"], line["answer"]) for line in lines(run)] == [
        ("p1", "42"),
        ("p2", "42"),
        ("p6", "1" + "0" * 16),
    ]
    rejects = lines(run, "rejects/fetch-train.jsonl")
    assert [(r["dataset"], r["line"]) for r in rejects] == [("raw.jsonl", n) for n in (3, 4, 5, 7, 8)]


def test_conversations_are_written_as_they_are_read(run: Run) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    reply = {"role": "assistant", "content": "2"}
    write(
        run.workspace.root / "raw.jsonl",
        [{"messages": [*talk, reply]}, {"messages": talk}, {"messages": talk[1:]}],
    )
    fetch_sources(chatting := changed(run, chat=True), [Source(dataset="raw.jsonl", prompt="messages")])
    assert [line["prompt"] for line in lines(run)] == [talk, "1+1="]
    prompts, rejects = scan_prompts(run.workspace.resolve("data/train.jsonl"), chatting.config.data)
    assert ([list(p.turns) for p in prompts], rejects) == ([talk, talk[1:]], [])


def test_integers_with_gaps_keep_their_form_whatever_the_library_makes_of_them(run: Run) -> None:
    (folder := run.workspace.root / "raw").mkdir()
    (folder / "train.csv").write_text("prompt,answer,n\np1,42,1\np2,43,\n")
    fetch_sources(run, [Source(dataset="raw", answer="answer", where={"n": ("1",)})])
    assert [line["answer"] for line in lines(run)] == ["42"]


def test_a_record_of_sources_that_cannot_be_read_is_named(run: Run) -> None:
    write(run.workspace.root / "raw.jsonl", numbered("q", 1))
    fetch_sources(run, [Source(dataset="raw.jsonl")])
    (run.workspace.root / "data" / "train.jsonl.sources.json").write_text("{")
    with pytest.raises(ConfigError, match=r"train.jsonl.sources.json.* cannot be read(.|\n)*--force"):
        fetch_sources(run, [Source(dataset="raw.jsonl")])
