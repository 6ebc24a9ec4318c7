"""Distances of a run's models to the teacher: from the evaluation's summary to rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from tropd.pipeline.report.data.facts import Distance, Evaluation, Measure
from tropd.storage.workspace import EVALUATED

NAMES = {"before": "Student before", "after": "Student after", "teacher": "Teacher"}
MEASURES = ("reverse_kl", "forward_kl", "acceptance", "length", "truncated", "entropy")
_BY_DEFINITION = {"reverse_kl": "0", "forward_kl": "0", "acceptance": "1"}
_SHOWN = {"reverse_kl": 3, "forward_kl": 3, "acceptance": 3, "length": 1}
"""Columns of the table, and their decimals."""


def read_distances(summary: Mapping[str, Any]) -> dict[str, Distance]:
    """Distances by model, from the summary of the stage; an unreadable one counts as absent."""
    found: Any = summary.get("distance")
    distances: dict[str, Distance] = {}
    for who in EVALUATED if isinstance(found, dict) else ():
        with suppress(KeyError, TypeError, AttributeError, ValidationError):
            one = found[who]
            measures = {name: _measure(one[name]) for name in MEASURES}
            distances[who] = Distance(prompts=one["prompts"], method=one["method"], **measures)
    return distances


def _measure(found: Mapping[str, Any] | None) -> Measure | None:
    if found is None or found["mean"] is None:
        return None
    low, high = found["low"], found["high"]
    return Measure(mean=found["mean"], interval=None if low is None or high is None else (low, high))


def distance_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row per model: ``who``, its ``name``, and a cell per column with ``value`` and ``interval`` as texts."""
    found = {who: evaluation.distance(who) for who in EVALUATED}
    return [
        {"who": who, "name": NAMES[who], "cells": [_cell(who, name, getattr(one, name)) for name in _SHOWN]}
        for who, one in found.items()
        if one is not None
    ]


def _cell(who: str, name: str, measure: Measure | None) -> dict[str, str]:
    if measure is None:
        value = _BY_DEFINITION.get(name, "") if who == "teacher" else ""
        return {"value": value, "interval": "by definition" if value else ""}
    places = _SHOWN[name]
    ends = measure.interval
    interval = "" if ends is None else f"{ends[0]:.{places}f} – {ends[1]:.{places}f}"
    return {"value": f"{measure.mean:.{places}f}", "interval": interval}


def distance_note(evaluation: Evaluation) -> str:
    """The way of measurement; empty where nothing was measured."""
    found = [one for who in EVALUATED if (one := evaluation.distance(who))]
    if not found:
        return ""
    how = (
        "exactly, over all tokens of the vocabulary"
        if all(one.method == "exact" for one in found)
        else "from the log-probs of sampled tokens (reverse KL, acceptance) and of the teacher’s most likely (forward KL)"
    )
    prompts = max(one.prompts for one in found)
    return (
        f"On {prompts} held-out prompts, {how}. KLs in nats per token; the teacher’s length is the one to reach."
        f"{_changed(evaluation.reverse_kl_change)}"
    )


def _changed(change: Measure | None) -> str:
    if change is None or change.interval is None:
        return ""
    low, high = change.interval
    chance = "; a difference that chance alone could make" if low <= 0.0 <= high and change.mean else ""
    value, least, most = (f"{number:+.3g}".replace("-", "\u2212") for number in (change.mean, low, high))
    return (
        f" Prompt by prompt, training changed the reverse KL by {value}"
        f" (95\u00a0% interval {least} to\u00a0{most}){chance}."
    )
