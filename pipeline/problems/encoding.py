"""Prompts as the token ids that a model reads: template, the tokens around a text, and the date that a template tells.

These ids do not vary from one day or process to the next: a template's ``strftime_now`` says the date that
it is given, and a template or tokenizer that encodes one prompt in different ways is refused.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from transformers.utils import chat_template_utils

from tropd.pipeline.models.tokenizers import chat_template, has_response_place
from tropd.pipeline.problems.prompts import Prompt, Reject
from tropd.storage.errors import ConfigError, DataError

BATCH = 256
"""Most prompts encoded at once; it decides nothing but the time."""
BATCH_CHARACTERS = 1_000_000
"""Most characters encoded at once, but for a single prompt: a tokenizer takes some 400 bytes of memory for each."""
REPEATS = 16
"""A choice of two at random stays unseen once in 2^15 times."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, and its token ids as a model reads it."""

    prompt: Prompt
    tokens: Sequence[int]
    teacher_tokens: Sequence[int] | None = None
    """Its token ids as its teacher reads it, where that has a context of its own."""

    @property
    def scored_after(self) -> Sequence[int]:
        """The token ids after which the teacher scores a response."""
        return self.tokens if self.teacher_tokens is None else self.teacher_tokens

    @property
    def id(self) -> str:
        return self.prompt.id


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts of a file, and the rejects and remarks of encoding."""

    prompts: list[EncodedPrompt]
    rejects: list[Reject]
    """Prompts without tokens, too long ones, and those that the chat template does not take."""
    notes: list[str]
    """The corrections to all prompts, in words."""
    date: datetime.date | None = None
    """The date that was given to the chat template, if it asked for one."""


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    chat: bool,
    template_args: Mapping[str, Any] = {},
    max_length: int,
    limit: int | None = None,
    date: datetime.date | None = None,
) -> Encoded:
    """The first ``limit`` prompts that fit, their token ids, and the rejects on the way.

    An end-of-sequence token that the tokenizer appends is left out, for nothing sensible comes after it; a
    begin-of-sequence token that the tokenizer adds to one in the text is left out too.

    Args:
        chat: each is a conversation in the chat template (of several named ones, ``default``).
        template_args: further arguments of the template.
        max_length: tokens; longer prompts are rejected.
        date: that of the template; if not given, that of this machine.

    Raises:
        DataError: ``chat`` without a chat template.
        ConfigError: a template that is none, or leaves out the assistant's turns; or one prompt is encoded in different
            ways.
    """
    if chat and not chat_template(tokenizer):
        raise DataError(
            "data.chat is true, but the tokenizer has no chat template",
            hint="name one for that model (student.chat_template_file, teacher.chat_template_file), or set data.chat = "
            "false",
        )
    if chat and _has_answers(prompts) and not has_response_place(tokenizer, template_args):
        raise ConfigError(
            "prompts have earlier turns of the assistant, which the chat template leaves out: it has no place for a "
            "response",
            hint="take a model's own chat template, or name another file (chat_template_file)",
        )
    kept: list[EncodedPrompt] = []
    rejects: list[Reject] = []
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ended = begun_twice = False
    date = date or today()
    with _clock(date) as clock:
        encode = _chat_encoder(tokenizer, template_args) if chat else _text_encoder(tokenizer)
        appends_end = _appends_end(prompts, tokenizer, encode, template_args if chat else None)
        for prompt, tokens in _one_by_one(prompts, encode):
            if limit is not None and len(kept) == limit:
                break
            if isinstance(tokens, str):
                rejects.append(Reject(prompt.line, f"prompt {prompt.id!r} {tokens}"))
                continue
            if appends_end and tokens[-1:] == [end]:
                tokens, ended = tokens[:-1], True
            if begin is not None and tokens[:2] == [begin, begin]:
                tokens, begun_twice = tokens[1:], True
            if not tokens:
                rejects.append(Reject(prompt.line, f"prompt {prompt.id!r} has no tokens"))
            elif len(tokens) > max_length:
                reason = f"prompt {prompt.id!r} has {len(tokens)} tokens, there is room for {max_length}"
                rejects.append(Reject(prompt.line, reason))
            else:
                kept.append(EncodedPrompt(prompt, tokens))
    notes = []
    if ended:
        notes.append(f"the tokenizer appends {tokenizer.eos_token!r} to prompts: it is left out")
    if begun_twice:
        notes.append(
            f"the tokenizer adds {tokenizer.bos_token!r} to prompts that begin with it: it is kept once"
        )
    return Encoded(kept, rejects, notes, date if clock.read else None)


def tokens_of(prompts: Sequence[EncodedPrompt]) -> list[Sequence[int]]:
    """Token ids of each prompt, as an engine takes them."""
    return [prompt.tokens for prompt in prompts]


def token_digest(prompts: Sequence[EncodedPrompt]) -> str:
    """SHA-256 over the prompts' ids and token ids, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        name = prompt.id.encode("utf-8", "surrogatepass")
        digest.update(np.array([len(name), len(prompt.tokens)], dtype="<i8").tobytes() + name)
        digest.update(np.asarray(prompt.tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def today() -> datetime.date:
    """The date of this machine."""
    return datetime.date.today()


_Encoder = Callable[[Sequence[Prompt]], list[list[int]]]


def _text_encoder(tokenizer: Any) -> _Encoder:
    return lambda prompts: tokenizer([prompt.text for prompt in prompts])["input_ids"]


def _chat_encoder(tokenizer: Any, template_args: Mapping[str, Any]) -> _Encoder:
    def encode(prompts: Sequence[Prompt]) -> list[list[int]]:
        turns = [list(prompt.turns) for prompt in prompts]
        found = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, **template_args
        )
        return [[int(token) for token in tokens] for tokens in found]

    return encode


def _encoded(prompts: Sequence[Prompt], encode: _Encoder) -> list[list[int] | str]:
    """Token ids of each prompt, or why it has none."""
    try:
        return list(encode(prompts))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template cannot be read: {error.message} (line {error.lineno})",
            hint="mend chat_template.jinja (or tokenizer_config.json) of the model, or set data.chat = false",
        ) from error
    except Exception as error:  # a template is a foreign program and may raise anything
        if len(prompts) == 1:
            return [f"is refused by the chat template or the tokenizer: {error}"]
        return [tokens for prompt in prompts for tokens in _encoded([prompt], encode)]


def _one_by_one(prompts: Sequence[Prompt], encode: _Encoder) -> Iterator[tuple[Prompt, list[int] | str]]:
    part: list[Prompt] = []
    characters = 0
    for prompt in prompts:
        length = len(prompt.text)
        if len(part) == BATCH or (part and characters + length > BATCH_CHARACTERS):
            yield from zip(part, _encoded(part, encode), strict=True)
            part, characters = [], 0
        part.append(prompt)
        characters += length
    yield from zip(part, _encoded(part, encode) if part else [], strict=True)


def _appends_end(
    prompts: Sequence[Prompt], tokenizer: Any, encode: _Encoder, template_args: Mapping[str, Any] | None
) -> bool:
    """True if the tokenizer appends the token that ends a sequence: tried on the shortest prompt that can be encoded,
    which is encoded several times.

    Raises:
        ConfigError: each time in another way.
    """
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.text)):
        tokens, *others = _encoded([prompt] * REPEATS, encode)
        if isinstance(tokens, str):
            continue
        if any(other != tokens for other in others):
            raise ConfigError(
                f"prompt {prompt.id!r} is encoded differently each time: the chat template or the tokenizer draws "
                "at random",
                hint="take it out of the model's chat_template.jinja (|random, lipsum) or tokenizer.json (dropout); each "
                "stage has to read the same prompts",
            )
        return _ends(tokens, tokenizer.eos_token_id) > _ends_written(prompt, tokenizer, template_args)
    return False


def _has_answers(prompts: Sequence[Prompt]) -> bool:
    return any(turn["role"] == "assistant" for prompt in prompts for turn in prompt.messages)


def _ends(tokens: Sequence[int], end: int) -> int:
    """Number of tokens ``end`` that a sequence ends with."""
    return next((n for n, token in enumerate(reversed(tokens)) if token != end), len(tokens))


def _ends_written(prompt: Prompt, tokenizer: Any, template_args: Mapping[str, Any] | None) -> int:
    """The same of a text, or of the chat template's output for it, before the tokenizer adds anything."""
    if template_args is None:
        return _ends(tokenizer(prompt.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    text = tokenizer.apply_chat_template(
        list(prompt.turns), add_generation_prompt=True, tokenize=False, **template_args
    )
    end = str(tokenizer.eos_token)
    return (len(text) - len(text.removesuffix(end))) // len(end)


class _Clock:
    """Takes the place of ``datetime.datetime`` where templates ask for the time: midnight of one day."""

    def __init__(self, date: datetime.date) -> None:
        self._date = date
        self.read = False

    def now(self) -> datetime.datetime:
        self.read = True
        return datetime.datetime.combine(self._date, datetime.time())


@contextmanager
def _clock(date: datetime.date) -> Iterator[_Clock]:
    """Make templates' ``strftime_now`` give this date.

    It is no argument of templates: these cannot be functions, and ``date_string``, which some take, has a form of its own
    in each.
    """
    clock = _Clock(date)
    own = chat_template_utils.datetime
    chat_template_utils.datetime = clock
    try:
        yield clock
    finally:
        chat_template_utils.datetime = own
