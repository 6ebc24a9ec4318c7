"""Lines with checksums: damage to one is seen, set aside, and costs no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tropd.storage.formats.step_log import log_line, read_log, resume_log

RECORDS = [{"step": step, "loss": step / 3, "bins": [step]} for step in range(6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(map(log_line, RECORDS)))
    return path


def test_every_flipped_bit_of_a_line_is_seen(path: Path) -> None:
    line = path.read_bytes().split(b"\n")[2]
    others = path.read_bytes().replace(line, b"{}", 1)
    for place in range(len(line)):
        flipped = bytearray(line)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(others.replace(b"{}", bytes(flipped), 1))
        found = read_log(path)
        assert found.whole == RECORDS[:2] + RECORDS[3:], flipped
        assert found.missing(range(6)) == [2]


def test_files_of_earlier_versions_have_no_checksums(path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "5\n[]\n\n")
    assert read_log(path).whole == RECORDS
    assert [line.number for line in read_log(path).damaged] == [7, 8]
    kept, _ = resume_log(path.parent, path.name, 4, range(4))
    assert kept == RECORDS[:4]
    assert "checksum" in path.read_text()
    assert read_log(path).whole == RECORDS[:4]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda line: line[: len(line) // 2], 2),
        (lambda line: line[:9] + bytes(400) + line[9:], 2),
        (lambda line: b"5", 2),
        (lambda line: b"\xff\xfe" + line, 2),
        (lambda line: line.replace(b'"step"', b'"stop"'), 2),
        (lambda line: b"[" * 100_000, 2),
    ],
)
def test_a_damaged_line_is_set_aside_and_all_others_stay(
    path: Path, damage: Callable[[bytes], bytes], lost: int
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    bad = damage(lines[lost][:-1])
    path.write_bytes(b"".join([*lines[:lost], bad + b"\n", *lines[lost + 1 :]]))
    kept, said = resume_log(path.parent, path.name, 5, range(5))
    assert kept == [record for record in RECORDS[:5] if record["step"] != lost]
    assert (path.parent.parent / "damaged/train/metrics.jsonl").read_bytes() == bad + b"\n"
    assert "line 3 of" in said
    assert "has no record of step 2" in said
    assert path.read_bytes() == b"".join([*lines[:lost], *lines[lost + 1 : 5]])


def test_what_a_kill_leaves_of_a_later_line_is_not_worth_a_word(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    assert resume_log(path.parent, path.name, 5, range(5)) == (RECORDS[:5], "")
    assert not (path.parent.parent / "damaged").exists()


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_is_gone_is_said(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert resume_log(path.parent, path.name, 3, range(3)) == ([], f"{path} has no record of step 0 to 2")
