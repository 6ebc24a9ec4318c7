"""Questions for the demo with a real model: enough of them, disjoint halves, one set per seed."""

from __future__ import annotations

import pytest

from tropd.pipeline.experiments.demo.questions import KINDS, all_questions, draw_questions
from tropd.storage.errors import ConfigError


def test_no_wording_of_a_held_out_subject_is_trained_on() -> None:
    training = {q.text for q in all_questions(held_out=False)}
    held_out = {q.text for q in all_questions(held_out=True)}
    assert not training & held_out
    for kind in KINDS.values():
        assert {subject for subject, _ in kind.subjects}
        for subject, _ in kind.subjects:
            texts = {wording.format(subject) for wording in kind.wordings}
            assert texts <= training or texts <= held_out
    assert len(training) + len(held_out) == sum(len(k.wordings) * len(k.subjects) for k in KINDS.values())


def test_the_same_seed_draws_the_same_different_questions() -> None:
    drawn = draw_questions(3, 600, held_out=False)
    assert drawn == draw_questions(3, 600, held_out=False) != draw_questions(4, 600, held_out=False)
    assert len({q.text for q in drawn}) == 600
    assert 0.3 < sum(q.answer is None for q in drawn) / 600 < 0.6


def test_held_out_questions_have_answers() -> None:
    drawn = draw_questions(0, 64, held_out=True)
    assert all(q.answer for q in drawn)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="held-out questions exist, not 1000") as caught:
        draw_questions(0, 1000, held_out=True)
    assert caught.value.hint == "lower demo.eval_problems"
