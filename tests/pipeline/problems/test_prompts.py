"""Prompt files: every bad line is named, before anything long begins."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.problems.encoding import encode_prompts, tokens_of
from tropd.pipeline.problems.prompts import Prompt, Reject, list_rejects, refuse, scan_prompts, write_rejects
from tropd.storage.errors import DataError


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def read_prompts(path: Path, config: DataConfig, *, need_answer: bool = False) -> list[Prompt]:
    prompts, rejects = scan_prompts(path, config, need_answer=need_answer)
    refuse(path, rejects)
    return prompts


def test_good_files_are_read_whatever_their_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"q": "1+1=", "a": 2}', "", '{"q": "2+2=", "key": "x"}')
    config = DataConfig(prompt_field="q", answer_field="a", id_field="key")
    assert read_prompts(path, config) == [Prompt("1", "1+1=", "2"), Prompt("x", "2+2=", None)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "1+"', "line 2: not valid JSON"),
        ("[1]", "line 2: not a JSON object but list"),
        ('{"text": "1"}', r"line 2: no field 'prompt' or 'messages' \(fields: text; see data.prompt_field"),
        ('{"prompt": 5}', "line 2: field 'prompt' is a number"),
        ('{"prompt": "  "}', "line 2: field 'prompt' is empty"),
        ('{"prompt": "x", "id": "a", "answer": "2"}', "line 2: id 'a' is also on line 1"),
        ('{"prompt": "x"}', "line 2: no field 'answer'"),
        ('{"prompt": "x", "answer": null}', "line 2: field 'answer' is null"),
        ('{"prompt": "x", "answer": " "}', "line 2: field 'answer' is empty, and an answer is needed"),
        (
            '{"prompt": "x", "answer": ["6"]}',
            "line 2: field 'answer' is a list .* in data.answer_field: answer.0",
        ),
        ('{"prompt": "x", "answer": {}}', "line 2: field 'answer' is an object"),
        ('{"prompt": "x", "answer": true}', "line 2: field 'answer' is true"),
        ('{"prompt": "x", "answer": NaN}', "line 2: field 'answer' is nan"),
        ('{"prompt": "x", "answer": "1", "id": NaN}', "line 2: field 'id' is nan"),
        ('{"prompt": "x", "answer": "1", "id": ["b"]}', "line 2: field 'id' is a list"),
        ('{"prompt": "x", "answer": "1", "domain": "\\ud800"}', "line 2: field 'domain' holds half"),
        ('{"prompt": null}', "line 2: field 'prompt' is null"),
        ('{"prompt": ["x"]}', "line 2: field 'prompt' is a list .* in data.prompt_field: prompt.0"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "ok", "id": "a", "answer": "1"}', line)
    with pytest.raises(DataError, match=words):
        read_prompts(path, DataConfig(), need_answer=True)


def test_all_bad_lines_are_counted_and_the_first_ones_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *["{"] * 15, "[]")
    with pytest.raises(
        DataError, match=r"16 bad line\(s\)(.|\n)*lines 1, 2, .* 10 and 5 more: (.|\n)*line 16: "
    ) as caught:
        read_prompts(path, DataConfig())
    assert str(caught.value).count("not valid JSON") == 1
    rejects = [Reject(n, f"reason {n}") for n in range(1, 14)]
    assert list_rejects(rejects, "row").splitlines()[-2:] == ["    row 10: reason 10", "    and 3 more"]


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", DataConfig())
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", ""), DataConfig())


def test_rejects_keep_what_the_line_was(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": \xff\n{"prompt": "ok"}\n{}\r\n')
    _, rejects = scan_prompts(path, DataConfig())
    write_rejects(path, rejects, tmp_path / "rejects" / "prompts.jsonl")
    written = [json.loads(x) for x in (tmp_path / "rejects" / "prompts.jsonl").read_text().splitlines()]
    assert [(r["line"], r["text"]) for r in written] == [(2, '{"prompt": \\xff'), (4, "{}")]
    assert "not UTF-8" in written[0]["reason"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "1+\xff="}', r"line 2: not UTF-8 text \(byte 15 of it\)"),
        (b'{"prompt": "1+\\ud800="}', "line 2: field 'prompt' holds half of a surrogate pair"),
    ],
)
def test_what_is_not_text_is_refused_rather_than_replaced(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n' + line + b"\n")
    with pytest.raises(DataError, match=words):
        read_prompts(path, DataConfig())


def test_text_of_any_script_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "größer? 漢字 \\ud83d\\ude00"}')
    assert read_prompts(path, DataConfig())[0].text == "größer? 漢字 😀"


def test_fields_may_be_paths_and_nulls_are_absent(tmp_path: Path) -> None:
    lines = [
        '{"m": [{"content": "1+1="}], "a": {"b": 2.0}, "id": null, "domain": null}',
        '{"m": [{"content": "x"}]}',
    ]
    config = DataConfig(prompt_field="m.0.content", answer_field="a.b")
    assert read_prompts(write(tmp_path / "p.jsonl", *lines), config) == [
        Prompt("1", "1+1=", "2"),
        Prompt("2", "x", None),
    ]


def test_an_answer_that_nobody_needs_may_be_anything(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "x", "answer": ["6"]}')
    assert read_prompts(path, DataConfig()) == [Prompt("1", "x", None)]


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1="}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def test_messages_are_written_by_the_chat_template(tmp_path: Path) -> None:
    (path := tmp_path / "p.json").write_text(
        json.dumps([{"q": [USER]}, {"q": [SYSTEM | {"content": "7"}, USER]}])
    )
    config = DataConfig(prompt_field="q", chat=True, template="{prompt}2")
    prompts = read_prompts(path, config)
    assert prompts[0] == Prompt("1", "1+1=2", None)
    assert (prompts[1].text, prompts[1].asked) == ("system: 7\n\nuser: 1+1=2", "1+1=2")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encoded = tokens_of(encode_prompts(prompts, tokenizer, chat=True, max_length=20).prompts)
    assert encoded == [tokenizer("1+1=2=")["input_ids"], tokenizer("71+1=2=")["input_ids"]]


def test_records_have_a_prompt_or_messages_in_every_kind_of_file(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2="}]
    rows = [{"messages": turns, "answer": 4}, {"messages": [USER], "answer": 2}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        many, one = read_prompts(tmp_path / name, DataConfig(chat=True, system="Be brief."))
        assert [many.answer, one.answer] == ["4", "2"]
        assert list(many.turns) == [SYSTEM, *turns]
        assert (list(one.turns), one.text, one.asked) == ([SYSTEM, USER], "1+1=", "1+1=")
    both = read_prompts(
        write(tmp_path / "b.jsonl", json.dumps({"prompt": "x", "messages": turns})), DataConfig()
    )
    assert both[0].text == "x"


def test_a_record_without_a_prompt_and_one_with_an_unknown_role_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        '{"question": "x"}',
        '{"messages": [{"role": "bot", "content": "x"}]}',
        '{"messages": [{"content": "x"}]}',
        '{"messages": []}',
    )
    with pytest.raises(DataError) as caught:
        read_prompts(path, DataConfig(chat=True))
    assert "line 1: no field 'prompt' or 'messages' (fields: question; see data.prompt_field)" in str(
        caught.value
    )
    assert "line 2: field 'messages' has the unknown role 'bot' in message 0" in str(caught.value)
    assert "lines 3, 4: field 'messages' is not a list of messages" in str(caught.value)


def test_messages_without_a_chat_template_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps({"messages": [SYSTEM, USER]}))
    with pytest.raises(
        DataError, match=r'line 1: .*data.chat = true.*data.prompt_field = "messages.1.content"'
    ):
        read_prompts(path, DataConfig(prompt_field="messages"))
    assert read_prompts(path, DataConfig(prompt_field="messages.1.content"))[0].text == "1+1="


def test_rejects_of_files_that_have_no_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "größer"}, {"prompt": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-16")
    for name, unit in [("p.parquet", "row"), ("p.json", "record")]:
        _, rejects = scan_prompts(tmp_path / name, DataConfig())
        with pytest.raises(DataError, match=rf"1 bad {unit}\(s\):\n    {unit} 2: field 'prompt' is null"):
            refuse(tmp_path / name, rejects)
        write_rejects(tmp_path / name, rejects, target := tmp_path / "rejects.jsonl")
        assert json.loads(target.read_text())["text"] == '{"prompt": null}'


def test_an_answer_that_may_be_missing_may_not_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    records = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": None}]
    records += [{"prompt": "d", "answer": " "}, {"prompt": "e", "answer": ["5"]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts, rejects = scan_prompts(path, DataConfig(), check_answer=True)
    assert [prompt.answer for prompt in prompts] == ["1", None, None, None]
    assert [(reject.line, "is a list of 1 values" in reject.reason) for reject in rejects] == [(5, True)]
