"""Conversations as prompts."""

from __future__ import annotations

from typing import Any

import pytest

from tropd.pipeline.problems.chat_messages import (
    as_text,
    in_template,
    is_messages,
    read_messages,
    with_system,
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "2"}


def test_messages_are_lists_of_objects_with_roles() -> None:
    assert is_messages([USER])
    for other in ([], [USER, "x"], [{"from": "human", "value": "x"}], USER, "x", None):
        assert not is_messages(other)


def test_nulls_and_the_last_answer_are_left_out_and_parts_joined() -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    given = [SYSTEM | {"tool_calls": None}, USER | {"content": parts}, REPLY]
    assert read_messages(given) == (SYSTEM, USER)
    assert read_messages([USER, REPLY, USER]) == (USER, REPLY, USER)


def test_the_template_goes_around_the_last_question() -> None:
    asked = {"role": "user", "content": "Q: 1+1? Box it."}
    assert in_template((USER, REPLY, USER), "Q: {prompt} Box it.") == (USER, REPLY, asked)


def test_a_system_message_is_for_those_that_have_none() -> None:
    assert with_system((USER, REPLY, USER), "Be brief.") == (SYSTEM, USER, REPLY, USER)
    assert with_system((SYSTEM, USER), "Be long.") == (SYSTEM, USER)


def test_text_to_be_shown() -> None:
    assert as_text((USER,)) == "1+1?"
    assert as_text((SYSTEM, USER)) == "system: Be brief.\n\nuser: 1+1?"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([SYSTEM, REPLY], "no turn of the user"),
        ([{"role": "user", "content": " "}], "no turn of the user"),
        ([{"role": "user"}], "no turn of the user"),
        ([{"role": 1, "content": "x"}], "no role in message 0"),
        ([USER, {"role": "bot", "content": "x"}], r"unknown role 'bot' in message 1 \(roles: system, user, "),
        (
            [USER | {"content": [{"type": "image", "url": "x"}]}],
            r"something other than text in message 0 \(image\)",
        ),
        ([USER | {"content": 5}], r"message 0 \(int\)"),
        ([USER | {"content": "\ud800"}], "half of a surrogate pair"),
        ([USER | {"when": object()}], "neither text nor a number"),
        ([USER | {"weight": float("nan")}], "neither text nor a number"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_messages(messages)
