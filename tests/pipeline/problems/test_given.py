"""Prompts as values: every form becomes a record that the reader of prompt files takes, or is refused by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.problems.given import records, write_records
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.storage.errors import ConfigError, DataError, TropdError

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\u2028there"}]


def test_texts_conversations_and_records_are_read_as_they_were_given(tmp_path: Path) -> None:
    given = ["1+1=", TURNS, {"prompt": "2+2=", "answer": "4", "level": 3}]
    write_records(records(given, "prompts"), tmp_path / "p.jsonl", "prompts")
    found, rejects = scan_prompts(tmp_path / "p.jsonl", DataConfig(chat=True))
    assert not rejects
    assert [prompt.id for prompt in found] == ["0", "1", "3"]
    assert [prompt.answer for prompt in found] == [None, None, "4"]
    assert list(found[1].turns) == TURNS
    assert found[0].text == "1+1="


def test_a_dataset_is_its_rows() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    whole = datasets.Dataset.from_list(rows)
    assert records(whole, "prompts") == rows
    with pytest.raises(ConfigError, match="DatasetDict with train") as caught:
        records(datasets.DatasetDict(train=whole), "prompts")
    assert 'prompts=dataset["train"]' in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ([], ConfigError, "prompts is empty"),
        ({"prompt": "a"}, ConfigError, "not a collection"),
        (TURNS, DataError, r"prompts\[0\] is a message"),
        (["a", 7], DataError, r"prompts\[1\] is a int"),
        (["a", None], DataError, r"prompts\[1\] is a NoneType"),
    ],
)
def test_what_is_no_prompt_is_refused(given: Any, kind: type[TropdError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        records(given, "prompts")
    assert caught.value.hint or given == []


def test_prompts_that_a_stage_was_made_with_are_not_replaced(tmp_path: Path) -> None:
    path, stage = tmp_path / "p.jsonl", tmp_path / "prefixes"
    write_records(records(["a", "b"], "prompts"), path, "prompts")
    before = path.read_bytes()
    write_records(records(["a", "b"], "prompts"), path, "prompts", used_by=stage)
    with pytest.raises(DataError, match=r"2 instead of 2, and the first that differs is prompts\[1\]"):
        write_records(records(["a", "c"], "prompts"), path, "prompts", used_by=stage)
    assert path.read_bytes() == before
    write_records(records(["a", "c"], "prompts"), path, "prompts")
    assert path.read_bytes() != before


def test_a_value_that_json_lacks_is_refused(tmp_path: Path) -> None:
    for value in (object(), float("nan")):
        with pytest.raises(DataError, match=r"prompts\[0\] cannot be written"):
            write_records([{"prompt": "a", "extra": value}], tmp_path / "p.jsonl", "prompts")
    assert not (tmp_path / "p.jsonl").exists()
