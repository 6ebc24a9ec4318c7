"""Tokenizers compared by content: the check that the token ids of two models mean the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tropd.storage.errors import ConfigError

MAX_SHOWN_DIFFERENCES = 5
MAX_SHOWN_CHARACTERS = 120
DEFAULT = "default"
CHAT_TEMPLATE = "chat template"
PLACE = "a response"
"""Text whose place in a conversation is looked for."""
END = "end of sequence"
"""The part that decides where responses stop, not what ids mean: see ``stops``."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """The properties in which two models that exchange token ids must agree."""

    digest: str
    """SHA-256 of the vocabulary, the merges, the rules and the special tokens."""
    vocab_size: int
    parts: Mapping[str, str]
    """SHA-256 of each of these, and of the chat template, by name."""


def num_tokens(tokenizer: Any) -> int:
    """Number of ids of a tokenizer: every token's id is below this. A model may have rows for more."""
    return 1 + max(tokenizer.get_vocab().values())


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Hash vocabulary, merges, normalization, and the added tokens with the one that ends a sequence.

    The chat template is a part but not in the digest: it decides how prompts are written where ``data.chat`` is on,
    and nothing else, while a base model and the model tuned from it often differ there.
    """
    content = _content(tokenizer)
    parts = {name: _digest(value) for name, value in content.items()}
    whole = _digest({name: value for name, value in parts.items() if name != CHAT_TEMPLATE})
    return TokenizerIdentity(whole, len(tokenizer), parts)


def differing_parts(ours: Mapping[str, str], theirs: Mapping[str, str], *, chat: bool) -> list[str]:
    """Names of the parts that differ in the meaning of ids, of those that both sides name; the chat template counts where
    ``chat`` is on."""
    return [
        name
        for name in ours.keys() & theirs.keys()
        if name != END and ours[name] != theirs[name] and (chat or name != CHAT_TEMPLATE)
    ]


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a pair whose token ids do not mean the same.

    Output layers padded to different sizes are fine; only the tokenizers' content is compared.
    Chat templates are compared by the prompts that they write (see ``same_prompts``).

    Raises:
        ConfigError: with the first differences of each part.
    """
    ours, theirs = tokenizer_identity(student), tokenizer_identity(teacher)
    names = differing_parts(ours.parts, theirs.parts, chat=False)
    if not names:
        return
    mine, other = _content(student), _content(teacher)
    lines = []
    for name in (name for name in mine if name in names):
        found = list(_differences(name, mine[name], other[name]))
        lines.append(f"{name}: {len(found)} differ")
        lines += [f"  {line}" for line in found[:MAX_SHOWN_DIFFERENCES]]
    shown = "\n    ".join(lines)
    raise ConfigError(
        f"student and teacher have different tokenizers ({ours.vocab_size} and {theirs.vocab_size} tokens):\n"
        f"    {shown}",
        hint="distillation by log-probs needs models that share a tokenizer",
    )


def _content(tokenizer: Any) -> dict[str, Any]:
    """Everything that gives token ids their meaning, by part, as mappings from a place to a value."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else {}
    model = data.get("model", {})
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        "vocabulary": dict(tokenizer.get_vocab()),
        "merges": {str(rank): _joined(merge) for rank, merge in enumerate(model.get("merges") or [])},
        "rules": {name: data.get(name) for name in ("normalizer", "pre_tokenizer")},
        "special tokens": {str(number): str(token) for number, token in added.items() if token.special},
        END: {"eos_token": tokenizer.eos_token},
        CHAT_TEMPLATE: {
            f"line {number}": line
            for number, line in enumerate(_templates(tokenizer).get(DEFAULT, "").splitlines(), start=1)
        },
    }


def chat_template(tokenizer: Any) -> str | None:
    """The template that prompts are written with: the only one, or of several named ones that of the name ``default``.

    Raises:
        ConfigError: none of several has that name.
    """
    templates = _templates(tokenizer)
    if templates and DEFAULT not in templates:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has several chat templates "
            f"({', '.join(sorted(templates))}), but none that is called 'default'",
            hint="copy the one to use to chat_template.jinja in the model's directory, or set data.chat = false",
        )
    return templates.get(DEFAULT)


def has_response_place(tokenizer: Any, template_args: Mapping[str, Any] = {}) -> bool:
    """True if the chat template writes what the assistant says, so that a response has its place."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": PLACE}]
    try:
        return PLACE in tokenizer.apply_chat_template(turns, tokenize=False, **template_args)
    except (
        Exception
    ):  # a template is a foreign program; one that takes no such conversation says so of each prompt
        return True


def _templates(tokenizer: Any) -> Mapping[str, str]:
    """Chat templates by name.

    Raises:
        ConfigError: something else is in their place.
    """
    found = getattr(tokenizer, "chat_template", None)
    templates = found if isinstance(found, Mapping) else {DEFAULT: found} if found else {}
    if not all(isinstance(template, str) for template in templates.values()):
        raise ConfigError(
            f"the chat template of the tokenizer in {tokenizer.name_or_path} is not text but {type(found).__name__}",
            hint="mend chat_template in tokenizer_config.json of the model, or leave it out",
        )
    return templates


def _joined(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _differences(part: str, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Iterator[str]:
    """Differences of two mappings, in words; places in the student's order, then those that only the teacher has."""
    places = sorted(student.keys() | teacher.keys()) if part == "vocabulary" else list({**student, **teacher})
    for place in places:
        mine, other = student.get(place), teacher.get(place)
        if mine != other:
            yield f"{_place(part, place)}: student {_shown(mine)}, teacher {_shown(other)}"


def _place(part: str, place: str) -> str:
    return {"vocabulary": repr(place), "merges": f"merge {place}", "special tokens": f"id {place}"}.get(
        part, place
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
