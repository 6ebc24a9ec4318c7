"""Numbers and texts for people."""

from __future__ import annotations

from tropd.pipeline.report.page.formats import duration, human_bytes, points, show_controls


def test_numbers_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 611_000, 999_700, 1.5e9, 2e15)] == [
        "0\u00a0bytes",
        "999\u00a0bytes",
        "1\u00a0kB",
        "611\u00a0kB",
        "1\u00a0MB",
        "1.5\u00a0GB",
        "2e+03\u00a0TB",
    ]
    assert [duration(s) for s in (0.04, 59.94, 59.99, 145.4, 3599.7, 7800)] == [
        "0.0\u00a0s",
        "59.9\u00a0s",
        "1\u00a0min 0\u00a0s",
        "2\u00a0min 25\u00a0s",
        "1\u00a0h 0\u00a0min",
        "2\u00a0h 10\u00a0min",
    ]
    assert (points(0.342), points(-0.01)) == ("+34.2", "−1.0")


def test_control_characters_are_shown() -> None:
    assert show_controls("a\x00\x1b[31m\r\n\tb\rc\x7f") == "a␀␛[31m\n\tb\nc␡"
