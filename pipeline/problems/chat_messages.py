"""A prompt as a list of messages: ``[{"role": "system", "content": …}, {"role": "user", "content": …}]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tropd.storage.formats.record_fields import MAX_TEXT, printable

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
"""``role`` and ``content``, and further fields that the chat template of the model reads (``name``, ``tool_calls``)."""


def is_messages(value: Any) -> bool:
    """True if a value is meant as messages: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def read_messages(value: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages as chat templates take them. Nulls (of Parquet) are left out, parts of text joined.

    A last turn of the assistant is left out: it is an answer, and answers are sampled.

    Raises:
        ValueError: something is not text, or no user turn asks anything.
    """
    messages = [_message(number, message) for number, message in enumerate(value)]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise ValueError("has no turn of the user with text")
    if (length := sum(len(message["content"]) for message in messages)) > MAX_TEXT:
        raise ValueError(f"has {length:,} characters; a prompt has at most {MAX_TEXT:,}")
    try:
        # Written and read: only values that a template can take, and text that can be stored, are left.
        text = json.dumps(messages, ensure_ascii=False, allow_nan=False, default=float)
        text.encode()
        plain: list[Message] = json.loads(text)
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    except (TypeError, ValueError, RecursionError, OverflowError):
        raise ValueError("holds something that is neither text nor a number") from None
    return tuple(plain)


def in_template(messages: Sequence[Message], template: str) -> tuple[Message, ...]:
    """The messages with ``template`` around the text of the user's last turn, at ``{prompt}``."""
    return with_question(messages, lambda text: template.replace("{prompt}", text))


def with_question(messages: Sequence[Message], changed: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with another text of the user's last turn."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    return tuple(
        {**message, "content": changed(message["content"])} if number == last else message
        for number, message in enumerate(messages)
    )


def with_system(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """The messages after this system message, where they have none of their own."""
    if any(message["role"] == "system" for message in messages):
        return tuple(messages)
    return ({"role": "system", "content": system}, *messages)


def as_text(messages: Sequence[Message]) -> str:
    """Messages as text to be shown: that of a single turn of the user as it is, others with their roles."""
    if [message["role"] for message in messages] == ["user"]:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def last_user_turn(value: Sequence[Mapping[str, Any]]) -> int:
    """Number of the user's last turn, for an example of a path; 0 without one."""
    return max((number for number, message in enumerate(value) if message["role"] == "user"), default=0)


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise ValueError(f"has no role in message {number}")
    if role not in ROLES:
        raise ValueError(
            f"has the unknown role {printable(role)!r} in message {number} (roles: {', '.join(ROLES)})"
        )
    kept = {name: value for name, value in message.items() if value is not None}
    return kept | {"content": _content(number, message.get("content"))}


def _content(number: int, content: Any) -> str:
    if content is None:  # an assistant's turn that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    kinds = (
        {str(part.get("type")) for part in content if isinstance(part, dict)}
        if isinstance(content, list)
        else {type(content).__name__}
    )
    raise ValueError(
        f"has something other than text in message {number} ({printable(', '.join(sorted(kinds)))})"
    )
