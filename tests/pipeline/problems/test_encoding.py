"""Prompts as token ids: the same ones in every process and on every day, with nothing after them and one begin token."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tropd.pipeline.experiments.demo.tokenizer import EOS_ID, PAD_ID, make_tokenizer
from tropd.pipeline.problems import encoding
from tropd.pipeline.problems.encoding import EncodedPrompt, encode_prompts, token_digest, tokens_of
from tropd.pipeline.problems.prompts import Prompt, Reject
from tropd.storage.errors import ConfigError, DataError

USER = "{{ messages[0].content }}"
DAY = datetime.date(2025, 3, 7)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{n}", text, None, line=n + 1) for n, text in enumerate(texts)]


def templated(template: Any) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def adding(single: str) -> Any:
    """A tokenizer that puts tokens around each text; its begin token is <pad>."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<eos>", EOS_ID), ("<pad>", PAD_ID)]
    )
    return tokenizer


def test_prompts_that_do_not_fit_are_rejected_with_their_line() -> None:
    tokenizer = make_tokenizer()
    both = [Prompt("a", "1+2=", None, line=1), Prompt("b", "1+2+3+4=", None, line=4)]
    found = encode_prompts(both, tokenizer, chat=False, max_length=8)
    assert (found.prompts[0].tokens, found.rejects) == ([3, 12, 4, 15], [])
    assert [one.prompt for one in found.prompts] == both
    found = encode_prompts(both, tokenizer, chat=False, max_length=7)
    assert [one.prompt for one in found.prompts] == both[:1]
    assert found.rejects == [Reject(4, "prompt 'b' has 8 tokens, there is room for 7")]
    with pytest.raises(DataError, match="no chat template"):
        encode_prompts(both, tokenizer, chat=True, max_length=8)


def test_the_limit_counts_prompts_that_fit() -> None:
    many = [Prompt(str(n), "1+" * n + "1=", None, line=n + 1) for n in range(4)]
    found = encode_prompts(many[::-1], make_tokenizer(), chat=False, max_length=6, limit=2)
    assert ([p.id for p in found.prompts], [r.line for r in found.rejects]) == (["2", "1"], [4])


def test_long_prompts_are_encoded_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 40)
    tokenizer, sizes = make_tokenizer(), []
    call = type(tokenizer).__call__

    def counting(self: Any, texts: Any, **options: Any) -> Any:
        sizes.append(sum(map(len, texts)) if isinstance(texts, list) and len(set(texts)) > 1 else 0)
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    prompts = [Prompt(str(n), f"{n}+" * (1 + 3 * n) + "1=", None) for n in range(8)]
    found = encode_prompts(prompts, tokenizer, chat=False, max_length=100)
    assert [len(tokens) for tokens in tokens_of(found.prompts)] == [len(prompt.text) for prompt in prompts]
    assert 0 < max(sizes) <= 40


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    many = prompts(*(f"{n}+{n * n}=" for n in range(7)))
    whole = encode_prompts(many, templated(USER), chat=True, max_length=99)
    monkeypatch.setattr("tropd.pipeline.problems.encoding.BATCH", 3)
    assert encode_prompts(many, templated(USER), chat=True, max_length=99) == whole
    assert [p.id for p in whole.prompts] == [f"p{n}" for n in range(7)]


@pytest.mark.parametrize(
    ("single", "text", "tokens", "said"),
    [
        ("$A", "1=", [3, 15], []),
        ("$A <eos>", "1=", [3, 15], ["the tokenizer appends '<eos>' to prompts: it is left out"]),
        ("<pad> $A", "1=", [PAD_ID, 3, 15], []),
        (
            "<pad> $A",
            "<pad>1=",
            [PAD_ID, 3, 15],
            ["the tokenizer adds '<pad>' to prompts that begin with it: it is kept once"],
        ),
        ("$A", "1=<eos>", [3, 15, EOS_ID], []),  # the user's own
        ("<pad> $A", "1=<eos>", [PAD_ID, 3, 15, EOS_ID], []),
        (
            "$A <eos>",
            "1=<eos>",
            [3, 15, EOS_ID],
            ["the tokenizer appends '<eos>' to prompts: it is left out"],
        ),
    ],
)
def test_an_appended_end_and_a_second_begin_are_left_out(
    single: str, text: str, tokens: list[int], said: list[str]
) -> None:
    found = encode_prompts(prompts(text), adding(single), chat=False, max_length=9)
    assert (tokens_of(found.prompts), found.notes) == ([tokens], said)


@pytest.mark.parametrize("single", ["$A", "<pad> $A", "$A <eos>", "<pad> $A <eos>"])
def test_a_chat_template_says_all_there_is(single: str) -> None:
    tokenizer = adding(single)
    tokenizer.chat_template = "{{ bos_token }}" + USER
    found = encode_prompts(prompts("1="), tokenizer, chat=True, max_length=9)
    assert (tokens_of(found.prompts), found.notes) == ([[PAD_ID, 3, 15]], [])


class Stubborn:
    """A tokenizer with code of its own, which adds its tokens whatever it is told."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply_chat_template(self, turns: Any, *, tokenize: bool = True, **options: Any) -> Any:
        found = self._inner.apply_chat_template(turns, tokenize=tokenize, **options)
        return [[PAD_ID, *tokens, EOS_ID] for tokens in found] if tokenize else found


def test_a_tokenizer_that_adds_its_tokens_to_a_chat_too() -> None:
    inner = adding("$A")
    inner.chat_template = "{{ bos_token }}" + USER
    found = encode_prompts(prompts("1=", "2="), Stubborn(inner), chat=True, max_length=9)
    assert tokens_of(found.prompts) == [[PAD_ID, 3, 15], [PAD_ID, 4, 15]]
    assert len(found.notes) == 2


def test_of_named_templates_the_default_one_is_used() -> None:
    tokenizer = templated({"tool_use": "9", "default": USER})
    assert encode_prompts(prompts("1="), tokenizer, chat=True, max_length=9).prompts[0].tokens == [3, 15]
    tokenizer.chat_template = {"rag": USER, "tool_use": USER}
    with pytest.raises(ConfigError, match=r"\(rag, tool_use\)"):
        encode_prompts(prompts("1="), tokenizer, chat=True, max_length=9)
    assert encode_prompts(prompts("1="), tokenizer, chat=False, max_length=9).prompts[0].tokens == [3, 15]


LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d") %}{%- else %}{%- set date_string = "26" %}{%- endif %}{%- endif %}'
    "{{- date_string }}" + USER
)


@pytest.mark.parametrize("template", ["{{ strftime_now('%d') }}" + USER, LLAMA])
def test_a_template_is_told_the_date_that_is_fixed(template: str) -> None:
    found = encode_prompts(prompts("1="), templated(template), chat=True, max_length=9, date=DAY)
    assert (tokens_of(found.prompts), found.date) == ([[2, 9, 3, 15]], DAY)
    today = encode_prompts(prompts("1="), templated(template), chat=True, max_length=9)
    assert today.date == datetime.date.today()
    silent = encode_prompts(prompts("1="), templated(USER), chat=True, max_length=9, date=DAY)
    assert silent.date is None


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}" + USER, "{{ lipsum(n=1) }}" + USER])
def test_a_template_that_says_something_else_each_time_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="prompt 'p0' is encoded differently each time"):
        encode_prompts(prompts("1="), templated(template), chat=True, max_length=9999)


def test_a_template_that_is_none_is_refused_and_one_that_refuses_names_the_prompt() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*\(line 2\)"):
        encode_prompts(prompts("1="), templated("\n{% if %}"), chat=True, max_length=9)
    picky = "{% if '2' in messages[0].content %}{{ raise_exception('no twos') }}{% endif %}" + USER
    found = encode_prompts(prompts("1=", "2=", "3="), templated(picky), chat=True, max_length=9)
    assert tokens_of(found.prompts) == [[3, 15], [5, 15]]
    assert found.rejects == [
        Reject(2, "prompt 'p1' is refused by the chat template or the tokenizer: no twos")
    ]


def test_the_digest_tells_ids_tokens_and_their_order_apart() -> None:
    one, two = prompts("1", "2")

    def digest(*parts: tuple[Prompt, list[int]]) -> str:
        return token_digest([EncodedPrompt(*part) for part in parts])

    digests = {
        digest((one, [1, 2]), (two, [3])),
        digest((one, [1]), (two, [2, 3])),
        digest((two, [1, 2]), (one, [3])),
        digest((one, [3]), (two, [1, 2])),
        digest((one, [1, 2])),
    }
    assert len(digests) == 5
    assert digest((one, [70000])) != digest((one, [70000 - 65536]))
