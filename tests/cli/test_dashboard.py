"""What a terminal shows of a training run, at several widths and with metrics of every kind."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from tropd.cli.dashboard import Dashboard, column, recent_mean, sparkline
from tropd.pipeline.report.data.facts import Verdict


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0 - 0.01 * step,
        "k1_mean": 0.5,
        "region_fraction_outlier": 0.25,
        "tokens_on_policy": 1000,
        "teacher_tokens_scored": 1000,
        "teacher_topk_tokens": 250,
        "teacher_bytes_received": 50_000,
        "teacher_retries": [0, 1],
        "response_length_mean": 20.0,
        "prefix_length_mean": 5.0,
        "memory_rss": 512e6,
        "time_rollout": 0.2,
        "time_score": 0.1,
        "time_wait": 0.3,
        "time_train": 0.2,
        "time_total": 0.5,
        **more,
    }


def shown(dashboard: Dashboard, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(dashboard)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_a_wide_terminal_has_curves_and_facts_side_by_side() -> None:
    text = shown(Dashboard("demo · tropd · seed 0", [record(n) for n in range(10)], 40))
    title, progress, loss, k1, outliers, reward, speed = text.splitlines()
    assert title == "demo · tropd · seed 0"
    assert progress.split("  ")[-3:] == ["10/40 steps", "0:00:15 left", "2,000 tokens/s"]
    name, value, curve, *facts = loss.split()
    assert (name, value, curve[0], curve[-1], len(curve)) == ("loss", "0.91", "█", "▁", 10)
    assert " ".join(facts) == "step 0.5 s: rollout 40%, score 20%, train 40%"
    assert k1.endswith("teacher 10,000 tokens, 25% with alternatives, 500\u00a0kB, 10 retries")
    assert outliers.startswith("outliers  25.0 %")
    assert outliers.endswith("length  20.0 tokens, 5.0 of them from the teacher")
    assert reward.startswith("reward      -0.5")
    assert reward.endswith("memory  512\u00a0MB")
    assert speed.split() == ["speed", "rollout", "5,000,", "score", "10,000,", "train", "5,000", "tokens/s"]


@pytest.mark.parametrize("width", [40, 60, 80, 96, 200])
def test_every_line_fits(width: int) -> None:
    text = shown(Dashboard("demo · tropd · seed 0", [record(n) for n in range(300)], 400), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "300/400" in text


def test_overlapping_parts_say_how_long_training_waits() -> None:
    ahead = [record(n, time_wait=0.05, time_total=0.3) for n in range(3)]
    assert "rollout 67%, score 33%, train 67%, waiting 17%" in shown(Dashboard("x", ahead, 9))


def test_several_processes_say_how_long_their_gpus_idle() -> None:
    several = [record(n, exchange_seconds=[0.05, 0.15]) for n in range(3)]
    assert "rollout 40%, score 20%, train 40%, idle 10% to 30%" in shown(Dashboard("x", several, 9))


def test_where_the_time_and_the_memory_went_is_said_as_far_as_it_is_known() -> None:
    known = {
        "memory_peak_rollout": 1e9,
        "memory_peak_score": None,
        "memory_peak_train": 3e9,
        "mfu_train": 0.41,
        "time_queue": 1.5,
    }
    text = shown(Dashboard("x", [record(n, **known) for n in range(3)], 9), 200).replace("\u00a0", " ")
    assert "memory  512 MB, rollout 1 GB, train 3 GB" in text
    assert "train 5,000 tokens/s, MFU 41%" in text
    assert "6 retries" not in text
    assert "3 retries, queue 1.5 s a step" in text
    unknown = shown(Dashboard("x", [record(0, time_queue=0.0)], 9))
    assert "MFU" not in unknown
    assert "queue" not in unknown


def test_accuracy_takes_the_place_of_the_reward_where_it_is_measured() -> None:
    records = [record(n, **({"accuracy_sampled": 0.1 * n} if n % 2 else {})) for n in range(8)]
    text = shown(Dashboard("x", records, 9))
    assert "accuracy  70.0 %" in text
    assert "reward" not in text


def test_what_is_off_is_said_below() -> None:
    verdict = Verdict(name="k1-rising", level="problem", sentence="K1 \x1bgrew.", evidence=[], advice="")
    lines = shown(Dashboard("run", [record(0)], 10, verdicts=[verdict])).splitlines()
    assert lines[-1] == "problem: K1 \\x1bgrew."


def test_nothing_yet_is_shown_as_that() -> None:
    assert "0/40 steps" in shown(Dashboard("x", [], 40, "starting"))
    assert "starting" in shown(Dashboard("x", [], 40, "starting"))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "text", True, [1]])
def test_values_that_are_no_numbers_are_passed_over(value: Any) -> None:
    names = ("loss", "k1_mean", "region_fraction_outlier", "time_total", "tokens_on_policy", "memory_rss")
    broken = dict.fromkeys(names, value) if not isinstance(value, str | bool | list) else {"loss": value}
    text = shown(Dashboard("x", [record(0), {**record(1), **broken}], 9))
    assert "nan" not in text
    assert "2/9 steps" in text
    assert column([{"loss": value}], "loss") == [None]


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0] * 5, 8) == "▁▁▁▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 8)) == 8
    assert sparkline([math.nan, 1.0, math.inf, 2.0], 8) == "▁█"


def test_recent_means_forget_the_first_steps() -> None:
    records = [{"time_total": 100.0}] * 10 + [{"time_total": 1.0}] * 20
    assert recent_mean(records, "time_total") == 1.0
    assert recent_mean([{}], "time_total") is None


def test_the_distance_to_the_teacher_has_curves_and_a_line() -> None:
    measured = {
        "distance_reverse_kl": 0.25,
        "distance_forward_kl": 0.125,
        "distance_acceptance": 0.9,
        "distance_length": 31.0,
        "distance_teacher_length": 20.5,
    }
    records = [record(n, **(measured if n == 4 else {})) for n in range(8)]
    text = shown(Dashboard("x", records, 9))
    assert "reverse KL    0.25" in text
    assert "forward KL   0.125" in text
    assert "held-out 31.0 tokens (teacher 20.5), acceptance 90.0 %" in text
    only = {name: value for name, value in measured.items() if name == "distance_length"}
    assert "held-out 31.0 tokens\n" in shown(Dashboard("x", [record(0, **only)], 9)) + "\n"
