"""Rewards of stored rollouts: in their own meta, or in a file beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.training.reward.function import Missing
from tropd.pipeline.training.reward.stored import check_stored, read_rewards, reward_of_text
from tropd.storage.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.25", 0.25),
        ("[1, null, 0.5]", [1, None, 0.5]),
        (None, Missing("its stored rollout has no field 'score' in meta")),
        ("null", Missing("its stored rollout has nothing in field 'score'")),
        ("good", Missing("its stored rollout has 'good' in field 'score', not a number")),
        ('["a"]', Missing("its stored rollout has \"['a']\" in field 'score', not a number")),
        (
            "1" + "0" * 400,
            Missing("its stored rollout has a number in field 'score' that is too large for a float"),
        ),
        ("true", Missing("its stored rollout has 'True' in field 'score', not a number")),
    ],
)
def test_rewards_in_meta(text: str | None, expected: object) -> None:
    assert reward_of_text(text, "score") == expected


def test_rewards_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    path.write_text(
        '{"prompt_id": "a", "sample_index": 0, "score": 0.5}\n'
        '{"prompt_id": "a", "sample_index": 1, "score": [1, null, 0.25]}\n'
        '{"prompt_id": "b", "sample_index": 0}\n'
    )
    found = read_rewards(path, "score")
    assert found["a", 0] == 0.5
    assert found["a", 1] == [1, None, 0.25]
    assert found["b", 0] == Missing(f"{path} line 3 has nothing in field 'score'")
    table = tmp_path / "rewards.csv"
    table.write_text("prompt_id,sample_index,score\na,0,0.5\na,1,much\n")
    found = read_rewards(table, "score")
    assert found["a", 0] == 0.5
    assert isinstance(found["a", 1], Missing)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt_id": "a", "sample_index": 0, "score": 2}',
            "line 2: sample 0 of prompt 'a' has a reward already",
        ),
        ('{"sample_index": 0, "score": 2}', "line 2: it needs prompt_id and sample_index"),
        ('{"prompt_id": "a", "sample_index": -1, "score": 2}', "a whole number"),
        ('{"prompt_id": "a", "sample_', "line 2: not valid JSON"),
    ],
)
def test_records_that_name_no_rollout_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rewards.jsonl"
    path.write_text('{"prompt_id": "a", "sample_index": 0, "score": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_rewards(path, "score")


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rewards(tmp_path / "absent.jsonl", "score")


class Rollouts:
    """Three stored rollouts by name."""

    def __len__(self) -> int:
        return 3

    def name(self, row: int) -> tuple[str, int]:
        return "a", row


def test_rollouts_without_a_reward_are_refused_before_training() -> None:
    store: Any = Rollouts()
    check_stored(store, lambda row: 1.0)
    with pytest.raises(
        DataError, match="2 of 3 stored rollouts have no reward; the first is sample 1 of prompt 'a': why"
    ):
        check_stored(store, lambda row: Missing("why") if row else 1.0)
