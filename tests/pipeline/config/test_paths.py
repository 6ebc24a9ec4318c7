"""Locations of pydantic's are paths of fields, without the tags of unions."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from tropd.pipeline.config.paths import fields_at, union_members
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.tables import KINDS
from tropd.pipeline.objectives.objective import Estimator, Schedule
from tropd.pipeline.objectives.partition_specs import Partition
from tropd.pipeline.objectives.token_weight_specs import TokenWeight
from tropd.storage.errors import ConfigError


def unions(annotation: Any) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """The tagged unions in a model, as pydantic has them in its schema: field and members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for field in annotation.model_fields.values():
            if isinstance(field.discriminator, str):
                yield field.discriminator, list(get_args(field.annotation))
            yield from unions(field.annotation)
        return
    if get_origin(annotation) in (Union, UnionType) or get_origin(annotation) is tuple:
        for member in get_args(annotation):
            yield from unions(member)


def test_tags_are_those_of_the_unions() -> None:
    found = list(unions(Config))
    assert {name for name, _ in found} <= KINDS == {"rule", "estimator", "kind"}
    for name, members in found:
        tags = {get_args(member.model_fields[name].annotation)[0]: member for member in members}
        assert union_members(Union[tuple(members)]) == tags  # noqa: UP007
    assert set(union_members(Partition)) == {
        "all", "none", "sampled", "expected", "ratio", "sign", "teacher_entropy", "reward",
    }  # fmt: skip
    assert set(union_members(Estimator)) == {
        "zero", "k1", "fixed", "nll", "topk_fkl", "topk_rkl", "topk_mix", "topk_jsd",
    }  # fmt: skip
    assert "overlap_drift" in union_members(TokenWeight)
    assert not union_members(Schedule)


@pytest.mark.parametrize(
    ("location", "path", "valid"),
    [
        (("objective", "partition", "ratio", "x"), "objective.partition.x", []),
        (("objective", "partition", "ratio"), "objective.partition", ["rule", "threshold"]),
        (
            ("objective", "token_weights", 1, "soft_or_top"),
            "objective.token_weights.1",
            ["since", "fraction"],
        ),
        (("student", "lora", "rank"), "student.lora.rank", []),
        (("student", "lora"), "student.lora", ["rank", "alpha"]),
        (("teacher", "url", "tuple[str, ...]", 0), "teacher.url", []),
        (("rollout", "stop_ids", 2), "rollout.stop_ids.2", []),
        (("data", "sources", 0, "where", "all", 0), "data.sources.0.where.all.0", []),
        (("nonsense", "x"), "nonsense", []),
    ],
)
def test_a_location_is_a_path_of_fields(location: tuple[str | int, ...], path: str, valid: list[str]) -> None:
    found, names = fields_at(Config, location)
    assert ".".join(map(str, found)) == path
    assert set(valid) <= set(names)
    assert bool(valid) == bool(names)


def test_a_name_that_is_also_a_tag_is_kept() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.where\.none\.0: "):
        parse_config("", ["data.sources=[{dataset='d', where={none=[1]}}]"])
