"""Fields that are called otherwise now are refused with that name."""

from __future__ import annotations

import pytest

from tropd.pipeline import config_problems
from tropd.pipeline.configuration import explain, parse_config
from tropd.storage.errors import ConfigError


@pytest.mark.parametrize(
    ("table", "old"),
    [
        ("[objective.outlier.loss]\nestimator='topk_fkl'", "line 3: objective.outlier.loss.k"),
        ("[[objective.token_weights]]\nkind='soft_or_top'", "objective.token_weights.0.k"),
    ],
)
def test_a_field_of_an_earlier_version_is_refused_with_its_name_now(table: str, old: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"{table}\nk = 32\n", where="W/config.toml")
    assert f"{old}: this field of earlier versions is objective.k now" in str(caught.value)


def test_renamed_fields_are_no_fields_and_their_names_are(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = parse_config("")
    for old, new in config_problems.RENAMED.items():
        assert explain(resolved, new)
        with pytest.raises(ConfigError, match=f"it is {new} now"):
            explain(resolved, old)
    monkeypatch.setattr(config_problems, "RENAMED", {"train.max_steps": "train.steps", "sampling": "rollout"})
    with pytest.raises(
        ConfigError, match=r"--set train\.max_steps=3: train\.max_steps: .* is train\.steps now"
    ):
        parse_config("", ["train.max_steps=3"])
    with pytest.raises(ConfigError, match="sampling: this field of earlier versions is rollout now"):
        parse_config("[sampling]\ntop_p = 0.5\n")
